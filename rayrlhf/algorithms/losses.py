"""PPO's two losses, one value per token. Sums, normalisation and ranks are the caller's business.

All arguments and results are [N]: the valid response tokens of a micro-batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class PolicyLoss(NamedTuple):
    loss: Tensor
    """[N] clipped surrogate loss, with gradient"""
    ratio: Tensor
    """[N] pi / pi_old, without gradient"""
    clipped: Tensor
    """[N] bool: the clipped branch is the larger loss, so this token has no gradient"""


class ValueLoss(NamedTuple):
    loss: Tensor
    """[N] clipped squared error, with gradient"""
    clipped: Tensor
    """[N] bool: the clipped branch is the larger loss"""


def policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_range: float) -> PolicyLoss:
    """max(-A ratio, -A clip(ratio, 1 - eps, 1 + eps)) (Schulman et al. 2017, eq. 7, as a loss)."""
    ratio = torch.exp(logprobs - old_logprobs)
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - clip_range, 1.0 + clip_range)
    return PolicyLoss(torch.maximum(unclipped, clipped), ratio.detach(), (clipped > unclipped).detach())


def importance_weights(old_logprobs: Tensor, generator_logprobs: Tensor, limit: float) -> Tensor:
    """min(pi_old / pi_generator, limit): what a token's policy loss is worth where another policy sampled it.

    pi_old is the policy before the update, around which the ratio is clipped: the decoupled objective of Hilton et al.
    2022 (eq. 5), with the weight truncated from above as in IMPALA (Espeholt et al. 2018, section 4.1).
    """
    return torch.exp(old_logprobs - generator_logprobs).clamp(max=limit)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip_range: float) -> ValueLoss:
    """0.5 max((V - R)^2, (clip(V, V_old - eps, V_old + eps) - R)^2) (the value clipping of OpenAI's baselines)."""
    unclipped = (values - returns) ** 2
    near = torch.clamp(values, old_values - clip_range, old_values + clip_range)
    clipped = (near - returns) ** 2
    return ValueLoss(0.5 * torch.maximum(unclipped, clipped), (clipped > unclipped).detach())
