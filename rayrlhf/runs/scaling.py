"""How many generators a run should have: a pure function of what the last batch took."""

from __future__ import annotations

import math

from rayrlhf.config import ScaleConfig


def wanted_generators(count: int, learner_wait: float, generator_idle: float, limits: ScaleConfig) -> int:
    """`count` generators, more of them, or one less.

    A learner that trains for L and waits for W per step needs generators that are (L + W) / L times as fast; the share
    `learner_wait` is W / (L + W). Generators that idle for a share are too many by that share. More come at once, since
    a learner costs more than a generator; they go one by one, so that the next batch shows what the last step did.

    Args:
        learner_wait: share of the last step in which the learner waited for its batch.
        generator_idle: share of it in which the generators had nothing to do, on average.
    """
    wanted = count
    if learner_wait > limits.target_learner_wait:
        wanted = math.ceil(count / max(1.0 - learner_wait, 0.1))
    elif count * (1.0 - generator_idle) < count - 1:
        wanted = count - 1
    return min(max(wanted, limits.min), limits.max)
