"""Reward functions, which give trajectories named scores, and the sum of those scores that an algorithm learns from.

`rewards` of the config says which there are: a reward model, functions of one's own (`rayrlhf.rewards.python`), or
both. The scorer calls them (`actors.rollouts.scorer`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from rayrlhf.data.rows import Row
from rayrlhf.errors import UserError
from rayrlhf.models.forward import Forward
from rayrlhf.trajectory import Trajectory


class RewardFunction(Protocol):
    """A function that scores trajectories.

    The score of a trajectory must not depend on the others in the call: scorers cut batches as they come.
    """

    def __call__(self, trajectories: Sequence[Trajectory]) -> dict[str, list[float]]:
        """One or more weighted scores by name, each a list with one score for each trajectory, in order."""
        ...


class RewardModelFunction:
    """A trained reward model, read at the last token of prompt + response."""

    def __init__(self, forward: Forward, name: str = "reward_model", weight: float = 1.0) -> None:
        self.forward, self.name, self.weight = forward, name, weight

    def __call__(self, trajectories: Sequence[Trajectory]) -> dict[str, list[float]]:
        rows = [Row.completion(t.prompt_ids, t.response_ids) for t in trajectories]
        return {self.name: [self.weight * score for score in self.forward.row_scores(rows)]}


def score_of(rewards: Mapping[str, float], ended: bool, missing_eos_reward: float | None) -> float:
    """The sum of a response's rewards.

    Args:
        ended: whether the response ended by itself.
        missing_eos_reward: score of a response that did not, in place of its rewards; None leaves the rewards. A fixed
            penalty is what Stiennon et al. 2020 and Huang et al. 2024 use (-1): their reward model, like this one, has
            only seen responses that ended.
    """
    return sum(rewards.values()) if ended or missing_eos_reward is None else missing_eos_reward


def scores(trajectories: Sequence[Trajectory], missing_eos_reward: float | None) -> Tensor:
    """[B] float32 sum of each trajectory's rewards.

    Args:
        trajectories: B, scored.
        missing_eos_reward: see `score_of`.

    Raises:
        UserError: a trajectory has no rewards.
    """
    totals = []
    for trajectory in trajectories:
        if not trajectory.rewards:
            raise UserError(f"trajectory {trajectory.prompt_id}/{trajectory.sample_index} was never scored")
        totals.append(score_of(trajectory.rewards, trajectory.finish_reason == "eos", missing_eos_reward))
    return torch.tensor(totals, dtype=torch.float32)
