"""The two losses of PPO and the importance weights, one value for each token.

All arguments and results are [N], for the N response tokens of a micro-batch. The caller sums over micro-batches and
ranks, and divides once by the number of tokens: a mean of means would weigh tokens by where they were computed.
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
    """[N] bool, whether the clipped branch is the larger loss, so that the token has no gradient"""


class ValueLoss(NamedTuple):
    loss: Tensor
    """[N] clipped squared error, with gradient"""
    clipped: Tensor
    """[N] bool, whether the clipped branch is the larger loss"""


def policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_range: float) -> PolicyLoss:
    """max(-A ratio, -A clip(ratio, 1 - eps, 1 + eps)): Schulman et al. 2017, equation 7, with the sign of a loss.

    Args:
        logprobs: [N] under the policy in training, nats, with gradient.
        old_logprobs: [N] under the policy before the step's first update.
        advantages: [N].
        clip_range: eps.
    """
    ratio = torch.exp(logprobs - old_logprobs)
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - clip_range, 1.0 + clip_range)
    return PolicyLoss(torch.maximum(unclipped, clipped), ratio.detach(), (clipped > unclipped).detach())


def importance_weights(old_logprobs: Tensor, generator_logprobs: Tensor, limit: float) -> Tensor:
    """[N] min(pi_old / pi_generator, limit): weights of the policy loss for tokens that an older policy has sampled.

    The ratio in `policy_loss` is still the one to pi_old, the policy before the step's first update. The two together
    are the decoupled objective of Hilton et al. 2022 (equation 5). The weight is truncated from above as in IMPALA
    (Espeholt et al. 2018, section 4.1), so that a few unlikely tokens do not decide an update.
    """
    return torch.exp(old_logprobs - generator_logprobs).clamp(max=limit)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip_range: float) -> ValueLoss:
    """0.5 max((V - R)^2, (clip(V, V_old - eps, V_old + eps) - R)^2), the value clipping of OpenAI's baselines.

    Args:
        values: [N] of the value model in training, with gradient.
        old_values: [N] before the step's first update.
        returns: [N] targets.
        clip_range: eps, in units of the values.
    """
    unclipped = (values - returns) ** 2
    near = torch.clamp(values, old_values - clip_range, old_values + clip_range)
    clipped = (near - returns) ** 2
    return ValueLoss(0.5 * torch.maximum(unclipped, clipped), (clipped > unclipped).detach())
