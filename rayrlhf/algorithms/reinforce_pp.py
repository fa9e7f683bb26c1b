"""REINFORCE++ (Hu 2025): PPO without a value model.

    advantages   G_t = sum from t on of (-beta KL), plus the score; whitened over all tokens of the batch
    loss         clipped surrogate, mean over tokens

With `baseline` the score first loses the mean of its prompt's responses (REINFORCE++-baseline).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rayrlhf.algorithms.advantages import AllReduce, generalized_advantages, kl_penalised_rewards, whiten
from rayrlhf.algorithms.experience import Fixed, Groups, Sampled
from rayrlhf.algorithms.losses import PolicyLoss, clipped_surrogate
from rayrlhf.config_rl import ReinforcePPConfig


class ReinforcePP:
    """The equations; `rayrlhf.algorithms.trainer` calls them."""

    def __init__(self, config: ReinforcePPConfig) -> None:
        self.config = config

    def advantages(
        self, sampled: Sampled, scores: Tensor, groups: Groups, beta: float, all_reduce: AllReduce
    ) -> tuple[Tensor, Tensor | None]:
        """See `Algorithm.advantages`."""
        if self.config.baseline:
            scores = (scores.double() - groups.statistics(scores).mean).float()
        rewards = kl_penalised_rewards(scores, sampled.logprobs, sampled.ref_logprobs, sampled.mask, beta)
        # Without values, and with gamma and lambda 1, generalised advantages are the sums of the rewards to come.
        to_come, _ = generalized_advantages(rewards, torch.zeros_like(rewards), sampled.mask, gamma=1.0, lam=1.0)
        return whiten(to_come, sampled.mask, all_reduce), None

    def policy_loss(self, logprobs: Tensor, fixed: Fixed, counts: Sequence[int]) -> PolicyLoss:
        """That of PPO."""
        config = self.config
        return clipped_surrogate(
            logprobs, fixed.old_logprobs, fixed.advantages, config.clip_range, config.clip_range_high
        )
