"""Rewards: functions from a batch of trajectories to named scores, and their sum.

`RewardFunction` is the seam where code or a remote service can take the reward model's place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from rayrlhf.errors import UserError
from rayrlhf.models.batching import Row
from rayrlhf.models.forward import Forward
from rayrlhf.trajectory import Trajectory


class RewardFunction(Protocol):
    """Scores a batch; a trajectory's score must not depend on the others in the batch."""

    def __call__(self, trajectories: Sequence[Trajectory]) -> dict[str, list[float]]:
        """Named scores, one per trajectory each."""
        ...


class RewardModelFunction:
    """A trained reward model, read at the last token of prompt + response."""

    def __init__(self, forward: Forward, name: str = "reward_model") -> None:
        self.forward, self.name = forward, name

    def __call__(self, trajectories: Sequence[Trajectory]) -> dict[str, list[float]]:
        rows = [Row.completion(t.prompt_ids, t.response_ids) for t in trajectories]
        return {self.name: self.forward.row_scores(rows)}


def scores(trajectories: Sequence[Trajectory], missing_eos_reward: float | None) -> Tensor:
    """[B] float32. A response without EOS scores `missing_eos_reward` in place of its rewards, unless that is None.

    The fixed penalty is Stiennon et al.'s and Huang et al.'s (-1 there): a response that never ended is not to be
    scored by a reward model that has only seen ended ones.
    """
    totals = []
    for trajectory in trajectories:
        if not trajectory.rewards:
            raise UserError(f"trajectory {trajectory.prompt_id}/{trajectory.sample_index} was never scored")
        total = sum(trajectory.rewards.values())
        if missing_eos_reward is not None and trajectory.finish_reason != "eos":
            total = missing_eos_reward
        totals.append(total)
    return torch.tensor(totals, dtype=torch.float32)
