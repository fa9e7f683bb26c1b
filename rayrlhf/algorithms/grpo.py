"""GRPO (Shao et al. 2024, DeepSeekMath): a response's advantage is its score against the others of its prompt.

    advantages   A = (r - mean of the group) / std of the group, the same for every token        section 4.1.2
    loss         clipped surrogate, mean over responses of their means over tokens, beta k3      equation 3

Its successors are settings of it:

    Dr. GRPO (Liu et al. 2025)    scale_by_std: false, loss_mean: constant, kl.coefficient: 0
    DAPO (Yu et al. 2025)         clip_range_high: 0.28, loss_mean: token, overlong_tokens, max_redraws,
                                  kl.coefficient: 0
    GSPO (Zheng et al. 2025)      ratio: sequence, clip_range: 3e-4, clip_range_high: 4e-4, kl.coefficient: 0
    CISPO (MiniMax 2025)          clip: weight, loss_mean: token, kl.coefficient: 0
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rayrlhf.algorithms.advantages import AllReduce, kl_penalised_rewards
from rayrlhf.algorithms.experience import Fixed, Groups, Sampled
from rayrlhf.algorithms.losses import PolicyLoss, clipped_surrogate, clipped_weight, sequence_logprobs
from rayrlhf.config_rl import GRPOConfig

EPS = 1e-6
"""Added to a standard deviation. Equal scores have an advantage of 0 whatever it is."""


class GRPO:
    """The equations; `rayrlhf.algorithms.trainer` calls them."""

    def __init__(self, config: GRPOConfig) -> None:
        self.config = config

    def advantages(
        self, sampled: Sampled, scores: Tensor, groups: Groups, beta: float, all_reduce: AllReduce
    ) -> tuple[Tensor, Tensor | None]:
        """See `Algorithm.advantages`."""
        rewards = kl_penalised_rewards(scores, sampled.logprobs, sampled.ref_logprobs, sampled.mask, beta).sum(1)
        group = groups.statistics(rewards)
        advantages = rewards.double() - group.mean
        if self.config.scale_by_std:
            advantages = advantages / (group.std + EPS)
        return torch.where(sampled.mask, advantages.float()[:, None], 0.0), None

    def policy_loss(self, logprobs: Tensor, fixed: Fixed, counts: Sequence[int]) -> PolicyLoss:
        """The surrogate of PPO, or that of GSPO or CISPO."""
        config, old = self.config, fixed.old_logprobs
        limits = config.clip_range, config.clip_range_high
        if config.clip == "weight":
            return clipped_weight(logprobs, old, fixed.advantages, *limits)
        if config.ratio == "sequence":
            # Zheng et al. 2025, equation 7: s = exp(mean of log pi - log pi_old), one for all tokens of a response.
            logprobs = sequence_logprobs(logprobs, old, counts, mean=True)
        return clipped_surrogate(logprobs, old, fixed.advantages, *limits)
