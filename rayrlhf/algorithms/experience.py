"""A batch of trajectories as tensors: whole responses before the updates, single tokens during them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rayrlhf.data.rows import Row
from rayrlhf.errors import UserError
from rayrlhf.rewards.functions import scores
from rayrlhf.trajectory import Trajectory


class Sampled(NamedTuple):
    """B responses of at most R tokens, padded on the right; 0 stands outside the mask. Log-probs are in nats."""

    scores: Tensor
    """[B] float32, sum of the rewards"""
    ended: Tensor
    """[B] bool, whether the response ended by itself"""
    mask: Tensor
    """[B, R] bool, whether the response has this token"""
    logprobs: Tensor
    """[B, R] float32, under the policy before the first update"""
    values: Tensor
    """[B, R] float32, of the value model before the first update"""
    ref_logprobs: Tensor
    """[B, R] float32, under the reference policy"""
    generator_logprobs: Tensor
    """[B, R] float32, as the generator has sampled with them"""
    entropy: Tensor
    """scalar float64, sum of the policy's entropy over all tokens, nats"""

    @classmethod
    def of(
        cls,
        trajectories: Sequence[Trajectory],
        logprobs: Sequence[Tensor],
        values: Sequence[Tensor],
        entropy: Tensor,
        missing_eos_reward: float | None,
    ) -> Sampled:
        """Pad what belongs to the trajectories, on the device of `entropy`.

        Raises:
            UserError: a trajectory was never scored.
        """
        device = entropy.device

        def padded(rows: Sequence[Tensor]) -> Tensor:
            return pad_sequence([row.float() for row in rows], batch_first=True).to(device)

        return cls(
            scores(trajectories, missing_eos_reward).to(device),
            torch.tensor([t.finish_reason == "eos" for t in trajectories], device=device),
            pad_sequence([torch.ones_like(row, dtype=torch.bool) for row in logprobs], batch_first=True).to(device),
            padded(logprobs),
            padded(values),
            padded([torch.from_numpy(_ref_logprobs(t)) for t in trajectories]),
            padded([torch.from_numpy(t.generator_logprobs) for t in trajectories]),
            entropy,
        )


class Fixed(NamedTuple):
    """What stays fixed over the updates, for each of N response tokens; all tensors are [N] float32."""

    old_logprobs: Tensor
    """under the policy before the first update, nats"""
    old_values: Tensor
    """of the value model before the first update"""
    advantages: Tensor
    returns: Tensor
    weights: Tensor
    """of the policy loss: 1 where the policy being trained has sampled the token itself"""

    @classmethod
    def joined(cls, parts: Sequence[Fixed]) -> Fixed:
        """The parts behind one another."""
        return cls(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


class Experience(NamedTuple):
    """One trajectory as the updates use it."""

    row: Row
    fixed: Fixed


def _ref_logprobs(trajectory: Trajectory) -> NDArray[np.float32]:
    if trajectory.ref_logprobs is None:
        raise UserError(f"trajectory {trajectory.prompt_id}/{trajectory.sample_index} has no reference log-probs")
    return trajectory.ref_logprobs
