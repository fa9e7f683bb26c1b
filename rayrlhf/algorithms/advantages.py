"""From scores and log-probs to rewards, advantages and returns: pure functions on [B, R] tensors.

There are B responses, padded on the right to R tokens. `mask[b, t]` says whether response b has a token t.
`values[b, t]` is the value of the state in which token t was chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

AllReduce = Callable[[Tensor], Tensor]
"""Element-wise sum over all ranks; `Ranks.sum` is one, the identity another for a single rank."""


class Advantages(NamedTuple):
    advantages: Tensor
    """[B, R], 0 outside the mask"""
    returns: Tensor
    """[B, R] advantages + values, the target of the value model; 0 outside the mask"""


def kl_penalised_rewards(scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, beta: float) -> Tensor:
    """Per-token rewards: -beta (log pi - log pi_ref) at every token, and the score added at the last one.

    Ziegler et al. 2019, equation 2, with log pi - log pi_ref of the sampled token as the estimate of the KL divergence.

    Args:
        scores: [B] one for each response.
        logprobs: [B, R] under the policy, nats.
        ref_logprobs: [B, R] under the reference policy, nats.
        mask: [B, R] bool; every response has a token.
        beta: coefficient of the penalty, score units per nat.

    Returns:
        [B, R], 0 outside the mask.
    """
    rewards = torch.where(mask, -beta * (logprobs - ref_logprobs), 0.0)
    last = mask.sum(1) - 1  # padding is on the right, so the count says where the last token is
    rewards[torch.arange(len(scores), device=scores.device), last] += scores
    return rewards


def generalized_advantages(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Advantages:
    """Generalised advantage estimation (Schulman et al. 2016, equations 12 and 16) over the tokens of a response.

        A_t = delta_t + gamma lam A_{t+1}   with   delta_t = r_t + gamma V_{t+1} - V_t

    Nothing follows the last token: V and A are 0 there, also if the response was cut off for its length.

    Args:
        rewards: [B, R].
        values: [B, R].
        mask: [B, R] bool.
        gamma: discount for one token.
        lam: 0 trusts the values (least variance), 1 the rewards (least bias).
    """
    rewards = torch.where(mask, rewards, 0.0)
    values = torch.where(mask, values, 0.0)
    advantage = torch.zeros_like(rewards[:, 0])
    next_value = torch.zeros_like(rewards[:, 0])
    reversed_advantages = []
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = torch.where(mask[:, t], delta + gamma * lam * advantage, 0.0)
        # Padding is on the right, so this loop meets it first. It leaves 0, as if nothing followed the last token.
        next_value = values[:, t]
        reversed_advantages.append(advantage)
    advantages = torch.stack(reversed_advantages[::-1], dim=1)
    return Advantages(advantages, torch.where(mask, advantages + values, 0.0))


def whiten(x: Tensor, mask: Tensor, all_reduce: AllReduce, *, shift_mean: bool = True) -> Tensor:
    """Scale to unit variance, and shift to zero mean, over the entries within the mask on all ranks.

    The variance is the unbiased one. A single entry, or equal ones, become 0 (or stay at their mean), never NaN.

    Args:
        x: [B, R].
        mask: [B, R] bool.
        all_reduce: sums over ranks; called twice.
        shift_mean: False keeps the mean.

    Returns:
        [B, R], 0 outside the mask.
    """
    # In float64, and in two passes: sums of squares less squared sums would lose digits of a small variance.
    kept = x[mask].double()
    count, total = all_reduce(torch.stack([x.new_tensor(len(kept), dtype=torch.float64), kept.sum()]))
    mean = total / count.clamp(min=1)
    (squares,) = all_reduce(((kept - mean) ** 2).sum().unsqueeze(0))
    variance = squares / (count - 1).clamp(min=1)
    white = (x - mean) * torch.rsqrt(variance + 1e-8)
    if not shift_mean:
        white = white + mean
    return torch.where(mask, white, 0.0).to(x.dtype)
