"""Reward functions, which give trajectories named scores, and the sum of those scores that an algorithm learns from.

`rewards` of the config says which there are: the reward model that the run trains, and those that read texts
(`rayrlhf.rewards.texts`). The scorer calls them (`actors.rollouts.scorer`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rayrlhf.data.rows import Row
from rayrlhf.errors import UserError
from rayrlhf.models.forward import Forward
from rayrlhf.rewards.score import score_of
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


def scores(trajectories: Sequence[Trajectory], missing_eos_reward: float | None) -> Tensor:
    """[B] float32 sum of each trajectory's rewards, see `learned_scores`; none is normalised."""
    return learned_scores(trajectories, missing_eos_reward, {})


def learned_scores(
    trajectories: Sequence[Trajectory], missing_eos_reward: float | None, normalized: Mapping[str, float]
) -> Tensor:
    """[B] float32 sum of each trajectory's rewards, of which some are normalised.

    Args:
        trajectories: B, scored; a whole batch, since mean and standard deviation of a normalised reward are over it.
        missing_eos_reward: see `score_of`.
        normalized: weight of each reward that is normalised, by name. Its scores s count as weight (s - mean) / std,
            with Bessel's correction; equal scores count as 0. Mean and std are over all responses, with EOS or without.

    Raises:
        UserError: a trajectory has no rewards.
    """
    for trajectory in trajectories:
        if not trajectory.rewards:
            raise UserError(f"trajectory {trajectory.prompt_id}/{trajectory.sample_index} was never scored")
    standard = {
        name: abs(weight) * _standardized([t.rewards[name] for t in trajectories])  # which have the weight's sign
        for name, weight in normalized.items()
    }
    totals = []
    for i, t in enumerate(trajectories):
        rewards = {name: standard[name][i] if name in standard else score for name, score in t.rewards.items()}
        totals.append(score_of(rewards, t.finish_reason == "eos", missing_eos_reward))
    return torch.tensor(totals, dtype=torch.float32)


def _standardized(values: Sequence[float]) -> NDArray[np.float64]:
    """[B] values less their mean, divided by their standard deviation (Bessel's); zeros where all are equal."""
    array = np.asarray(values, np.float64)
    # The mean of equal numbers may be off by a digit, and they would have a spread.
    if array.max() == array.min():
        return np.zeros_like(array)
    return np.asarray((array - array.mean()) / array.std(ddof=1))
