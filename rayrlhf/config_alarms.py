"""The section `alarms`: the limits of the warnings. What is warned of is in `rayrlhf.reports.alarms`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from rayrlhf.sections import Positive, Section

Limit = Annotated[float, Field(ge=0)] | None


class AlarmsConfig(Section):
    """Limits of the warnings. What passes a limit is said in one line when it begins; null turns a warning off.

    Training goes on, but for `max_steps_without_spread`. "Start" is the run's first step, whose batch was sampled by
    the model that `rl` starts from.
    """

    max_logprob_gap: Limit = 0.1
    """Mean |generator - learner| log-prob gap, nats a token."""
    max_kl: Limit = 30.0
    """KL to the reference, nats a response."""
    max_negative_kl: Limit = 1.0
    """How far the KL estimate may fall below 0, nats a response."""
    max_first_ratio_off_one: Limit = 0.01
    """Mean |ratio - 1| in the first mini-batch."""
    max_score_drop: Limit = 1.0
    """How far the mean score may fall below the start's, in standard deviations of the start's scores."""
    max_reward_drop: Limit = 1.0
    """With several rewards: how far one of them may fall below the start's mean, in its standard deviations at the
    start, while the score as a whole rises."""
    max_gold_drop: Limit = 3.0
    """How far gold may fall below its best `gold_window` steps while the score rises as far, in standard errors."""
    gold_window: Positive = 10
    """Steps over which gold and score are averaged for `max_gold_drop`."""
    min_score_spread: Limit = 0.1
    """Standard deviation of the scores as a share of the start's."""
    max_steps_without_spread: Positive | None = 3
    """After so many steps in a row whose responses all score the same, `rl` stops: nothing can be learnt from them."""
    max_repetition: Limit = 0.2
    """Share of an answer's 4-grams that it has had before, the mean over answers."""
    min_distinct_2: Limit = 0.5
    """Different 2-grams among all those of a step's answers, as a share of the start's."""
    max_common_opening: Limit = 0.5
    """Share of a step's answers that begin with the same four words."""
    min_length: Limit = 0.5
    """Mean response length as a share of the start's."""
    min_eos_rate: Limit = 0.5
    """Share of responses that end with EOS."""
    min_entropy: Limit = 0.2
    """Entropy of the policy as a share of the start's."""
    max_clip_fraction: Limit = 0.5
    """Share of tokens whose ratio was clipped."""
    min_over_length: Limit = 0.0
    """How far the reward model's held-out accuracy has to be above that of the answer's length, a share of pairs."""
