"""How many generators a run should have: a pure function of how long the last step waited and idled."""

from __future__ import annotations

import math

from rayrlhf.config_resources import ScaleConfig


def wanted_generators(count: int, learner_wait: float, generator_idle: float, limits: ScaleConfig) -> int:
    """The number of generators for the next step: more than `count`, `count`, or one less.

    A learner that trains for L seconds of a step and waits for W needs generators that are (L + W) / L times as fast.
    The share `learner_wait` is W / (L + W). Generators that idle for some share of a step are too many by that share.

    Several are added at once, since a waiting learner costs more than an idle generator. They are removed one by one,
    so that each step shows the effect of the last removal. For example, with target_learner_wait 0.1:

        >>> wanted_generators(4, learner_wait=0.5, generator_idle=0.0, limits=ScaleConfig(min=1, max=16))
        8
        >>> wanted_generators(4, learner_wait=0.0, generator_idle=0.5, limits=ScaleConfig(min=1, max=16))
        3

    Args:
        count: generators in the last step.
        learner_wait: share of the last step in which the learner waited for its batch.
        generator_idle: share of it in which the generators had nothing to do, on average.
        limits: the smallest and the largest number, and the share of waiting that is accepted.
    """
    wanted = count
    if learner_wait > limits.target_learner_wait:
        wanted = math.ceil(count / max(1.0 - learner_wait, 0.1))
    elif count * (1.0 - generator_idle) < count - 1:
        wanted = count - 1
    return min(max(wanted, limits.min), limits.max)
