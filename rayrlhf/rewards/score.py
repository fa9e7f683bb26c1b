"""The score of a response. No model here: the coordinator, which compares scores, does without transformers."""

from __future__ import annotations

from collections.abc import Mapping


def score_of(rewards: Mapping[str, float], ended: bool, missing_eos_reward: float | None) -> float:
    """The sum of a response's rewards.

    Args:
        ended: whether the response ended by itself.
        missing_eos_reward: score of a response that did not, in place of its rewards; None leaves the rewards. A fixed
            penalty is what Stiennon et al. 2020 and Huang et al. 2024 use (-1): their reward model, like this one, has
            only seen responses that ended.
    """
    return sum(rewards.values()) if ended or missing_eos_reward is None else missing_eos_reward
