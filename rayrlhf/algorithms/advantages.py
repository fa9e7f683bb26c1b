"""From scores and log-probs to rewards, advantages and returns. Pure functions on [B, R] tensors.

B responses, right-padded to R tokens; `mask[b, t]` says that token t belongs to response b.
Position t of `values` is the value of the state in which token t was chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

AllReduce = Callable[[Tensor], Tensor]
"""Element-wise sum over all learner ranks."""


class Advantages(NamedTuple):
    advantages: Tensor
    """[B, R], 0 where masked"""
    returns: Tensor
    """[B, R] advantages + values: what the value model is regressed on; 0 where masked"""


def kl_penalised_rewards(scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, beta: float) -> Tensor:
    """Per-token rewards: -beta (log pi - log pi_ref) at every token, the score added at the last one.

    Ziegler et al. 2019, eq. 2, with the k1 estimator per token. scores [B]; the rest [B, R]; returns [B, R].
    """
    rewards = torch.where(mask, -beta * (logprobs - ref_logprobs), 0.0)
    last = mask.sum(1) - 1
    rewards[torch.arange(len(scores), device=scores.device), last] += scores
    return rewards


def generalized_advantages(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Advantages:
    """GAE (Schulman et al. 2016, eq. 16) over response tokens; what follows the last token has value 0.

    A_t = delta_t + gamma lam A_{t+1} with delta_t = r_t + gamma V_{t+1} - V_t. All [B, R].
    """
    rewards = torch.where(mask, rewards, 0.0)
    values = torch.where(mask, values, 0.0)
    advantage = torch.zeros_like(rewards[:, 0])
    next_value = torch.zeros_like(rewards[:, 0])
    reversed_advantages = []
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = torch.where(mask[:, t], delta + gamma * lam * advantage, 0.0)
        next_value = values[:, t]
        reversed_advantages.append(advantage)
    advantages = torch.stack(reversed_advantages[::-1], dim=1)
    return Advantages(advantages, torch.where(mask, advantages + values, 0.0))


def whiten(x: Tensor, mask: Tensor, all_reduce: AllReduce, *, shift_mean: bool = True) -> Tensor:
    """Scale to unit variance (and zero mean) over the masked entries of the whole batch of all ranks.

    Unbiased variance; equal or single entries give 0 (or stay at their mean), never NaN. [B, R] -> [B, R].
    """
    kept = x[mask].double()
    count, total = all_reduce(torch.stack([x.new_tensor(len(kept), dtype=torch.float64), kept.sum()]))
    mean = total / count.clamp(min=1)
    (squares,) = all_reduce(((kept - mean) ** 2).sum().unsqueeze(0))
    variance = squares / (count - 1).clamp(min=1)
    white = (x - mean) * torch.rsqrt(variance + 1e-8)
    if not shift_mean:
        white = white + mean
    return torch.where(mask, white, 0.0).to(x.dtype)
