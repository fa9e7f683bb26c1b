"""A batch of trajectories as tensors: whole responses before the updates, single tokens during them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rayrlhf.algorithms.advantages import AllReduce
from rayrlhf.data.rows import Row
from rayrlhf.errors import UserError
from rayrlhf.rewards.functions import scores
from rayrlhf.trajectory import Trajectory


class GroupStatistics(NamedTuple):
    """Of the scores of all responses to each response's prompt, its own included; all tensors are [B] float64."""

    mean: Tensor
    """of the group's scores"""
    std: Tensor
    """their standard deviation, with Bessel's correction; 0 in a group of one"""
    size: Tensor
    """responses of the group"""


class Groups(NamedTuple):
    """Which response of the whole batch, of all ranks, answers which prompt; and which of them are this rank's."""

    prompts: Tensor
    """[whole batch] int64, the number of each response's prompt"""
    own: Tensor
    """[B] int64, the place of this rank's responses in the whole batch"""
    all_reduce: AllReduce
    """sums over ranks"""

    @classmethod
    def of(
        cls, prompt_ids: Sequence[str], own: Sequence[int], device: torch.device | str, all_reduce: AllReduce
    ) -> Groups:
        """Groups by prompt of the whole batch, `own` of which are this rank's."""
        numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompt_ids))}
        prompts = torch.tensor([numbers[prompt] for prompt in prompt_ids], device=device)
        return cls(prompts, torch.tensor(own, dtype=torch.int64, device=device), all_reduce)

    def whole(self, scores: Tensor) -> Tensor:
        """[whole batch] float64 scores of all ranks, in the order of `prompts`.

        Args:
            scores: [B] of this rank's responses.
        """
        # Every rank puts its own scores into a batch of zeros: their sum over ranks is exact, one term each.
        whole = scores.new_zeros(len(self.prompts), dtype=torch.float64)
        whole[self.own] = scores.double()
        return self.all_reduce(whole)

    def statistics(self, scores: Tensor) -> GroupStatistics:
        """Of each response's group, whichever ranks have its members.

        Args:
            scores: [B] of this rank's responses.
        """
        whole, count = self.whole(scores), int(self.prompts.max()) + 1

        def by_prompt(values: Tensor) -> Tensor:
            return values.new_zeros(count).index_add(0, self.prompts, values)

        def extreme(which: str) -> Tensor:
            start = whole.new_full((count,), -torch.inf if which == "amax" else torch.inf)
            return start.scatter_reduce(0, self.prompts, whole, which)

        size = by_prompt(torch.ones_like(whole))
        mean = by_prompt(whole) / size
        # In two passes: sums of squares less squared sums would lose digits, and equal scores would have a spread.
        squares = by_prompt((whole - mean[self.prompts]).square())
        std = (squares / (size - 1).clamp(min=1)).sqrt()
        # The mean of equal numbers may be off by a digit, and they would have a spread.
        high, low = extreme("amax"), extreme("amin")
        mean, std = torch.where(high == low, high, mean), torch.where(high == low, 0.0, std)
        own = self.prompts[self.own]
        return GroupStatistics(mean[own], std[own], size[own])


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
    values: Tensor | None
    """[B, R] float32, of the value model before the first update; None without a critic"""
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
        values: Sequence[Tensor] | None,
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
            None if values is None else padded(values),
            padded([torch.from_numpy(_ref_logprobs(t)) for t in trajectories]),
            padded([torch.from_numpy(t.generator_logprobs) for t in trajectories]),
            entropy,
        )


class Fixed(NamedTuple):
    """What stays fixed over the updates, for each of N response tokens; all tensors are [N] float32."""

    old_logprobs: Tensor
    """under the policy before the first update, nats"""
    ref_logprobs: Tensor
    """under the reference policy, nats"""
    advantages: Tensor
    weights: Tensor
    """of the policy loss: 1 where the policy being trained has sampled the token itself"""
    old_values: Tensor | None
    """of the value model before the first update; None without a critic"""
    returns: Tensor | None
    """targets of the value model; None without a critic"""

    @classmethod
    def joined(cls, parts: Sequence[Fixed]) -> Fixed:
        """The parts behind one another."""
        return cls._make(None if each[0] is None else torch.cat(each) for each in zip(*parts, strict=True))


class Experience(NamedTuple):
    """One trajectory as the updates use it."""

    row: Row
    fixed: Fixed


def _ref_logprobs(trajectory: Trajectory) -> NDArray[np.float32]:
    if trajectory.ref_logprobs is None:
        raise UserError(f"trajectory {trajectory.prompt_id}/{trajectory.sample_index} has no reference log-probs")
    return trajectory.ref_logprobs
