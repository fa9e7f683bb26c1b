"""RLOO (Ahmadian et al. 2024, "Back to Basics"): REINFORCE with the prompt's other responses as the baseline.

    advantages   R = score - beta sum of (log pi - log pi_ref); A = R - mean of the others' R      equations 2 and 8
    loss         clipped surrogate of the ratio of whole responses, mean over responses

With one update a step the ratio is 1, and the gradient is that of REINFORCE: A times the gradient of log pi(response).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rayrlhf.algorithms.advantages import AllReduce, kl_penalised_rewards
from rayrlhf.algorithms.experience import Fixed, Groups, Sampled
from rayrlhf.algorithms.losses import PolicyLoss, clipped_surrogate, sequence_logprobs
from rayrlhf.config_rl import RLOOConfig


class RLOO:
    """The equations; `rayrlhf.algorithms.trainer` calls them."""

    def __init__(self, config: RLOOConfig) -> None:
        self.config = config

    def advantages(
        self, sampled: Sampled, scores: Tensor, groups: Groups, beta: float, all_reduce: AllReduce
    ) -> tuple[Tensor, Tensor | None]:
        """See `Algorithm.advantages`."""
        returns = kl_penalised_rewards(scores, sampled.logprobs, sampled.ref_logprobs, sampled.mask, beta).sum(1)
        group = groups.statistics(returns)
        # R less the mean of the k - 1 others is k / (k - 1) times R less the mean of all k. Alone it learns nothing.
        others = group.size / (group.size - 1).clamp(min=1)
        advantages = (returns.double() - group.mean) * others
        return torch.where(sampled.mask, advantages.float()[:, None], 0.0), None

    def policy_loss(self, logprobs: Tensor, fixed: Fixed, counts: Sequence[int]) -> PolicyLoss:
        """The response is the action: its ratio is the product of those of its tokens."""
        config, old = self.config, fixed.old_logprobs
        whole = sequence_logprobs(logprobs, old, counts, mean=False)
        return clipped_surrogate(whole, old, fixed.advantages, config.clip_range, config.clip_range_high)
