"""Losses of the policy and the value model, and importance weights: one value for each token.

All arguments and results are [N], for the N response tokens of a micro-batch. The caller sums over micro-batches and
ranks, and divides once by the number of tokens, of responses, or by a constant (`rl.loss_mean`): a mean of means would
weigh tokens by where they were computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class PolicyLoss(NamedTuple):
    loss: Tensor
    """[N] with gradient"""
    ratio: Tensor
    """[N] pi / pi_old, without gradient"""
    clipped: Tensor
    """[N] bool, whether the ratio was clipped; in the surrogate the token then has no gradient"""


class ValueLoss(NamedTuple):
    loss: Tensor
    """[N] half the squared error, or the clipped one where that is larger; with gradient"""
    clipped: Tensor
    """[N] bool, whether the clipped branch is the larger loss"""


def clipped_surrogate(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_range: float, clip_range_high: float | None = None
) -> PolicyLoss:
    """max(-A ratio, -A clip(ratio, 1 - eps, 1 + eps)): Schulman et al. 2017, equation 7, with the sign of a loss.

    Args:
        logprobs: [N] under the policy in training, nats, with gradient.
        old_logprobs: [N] under the policy before the step's first update.
        advantages: [N].
        clip_range: eps.
        clip_range_high: eps of the upper bound, if it is another one (Yu et al. 2025, equation 8).
    """
    ratio = torch.exp(logprobs - old_logprobs)
    high = clip_range if clip_range_high is None else clip_range_high
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - clip_range, 1.0 + high)
    return PolicyLoss(torch.maximum(unclipped, clipped), ratio.detach(), (clipped > unclipped).detach())


def clipped_weight(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_range: float, clip_range_high: float | None = None
) -> PolicyLoss:
    """-clip(ratio, 1 - eps, 1 + eps) A log pi, where the clipped ratio has no gradient: CISPO (MiniMax 2025, eq. 4).

    No token loses its gradient. A `clip_range` of 1 is no lower bound, as in the paper's runs.

    Args:
        logprobs: [N] under the policy in training, nats, with gradient.
        old_logprobs: [N] under the policy before the step's first update.
        advantages: [N].
        clip_range: eps.
        clip_range_high: eps of the upper bound, if it is another one.
    """
    ratio = torch.exp(logprobs.detach() - old_logprobs)
    high = clip_range if clip_range_high is None else clip_range_high
    weight = ratio.clamp(1.0 - clip_range, 1.0 + high)
    return PolicyLoss(-weight * advantages * logprobs, ratio, weight != ratio)


def sequence_logprobs(logprobs: Tensor, old_logprobs: Tensor, counts: Sequence[int], *, mean: bool) -> Tensor:
    """[N] log-probs whose difference from the old ones is the same for all tokens of a response.

    It is the sum of the tokens' differences, so that a token's ratio is that of the whole response, or their mean.

    Args:
        logprobs: [N] with gradient; a response's tokens lie behind one another.
        old_logprobs: [N].
        counts: tokens of each response.
        mean: in place of the sum.
    """
    of_response = (logprobs - old_logprobs).split(list(counts))
    return old_logprobs + torch.cat([(each.mean() if mean else each.sum()).expand(len(each)) for each in of_response])


KL_ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "k2": lambda d: d.square() / 2,
    "k3": lambda d: torch.expm1(-d) + d,
}
"""A token's KL divergence, of d = log pi - log pi_ref of the sampled token (Schulman 2020, "Approximating KL
divergence"). k1, d itself, has no place in a loss: its gradient is 0 on average."""


def importance_weights(old_logprobs: Tensor, generator_logprobs: Tensor, limit: float) -> Tensor:
    """[N] min(pi_old / pi_generator, limit): weights of the policy loss for tokens that an older policy has sampled.

    The ratio in `clipped_surrogate` is still the one to pi_old, the policy before the step's first update. The two
    together are the decoupled objective of Hilton et al. 2022 (equation 5). The weight is truncated from above as in
    IMPALA (Espeholt et al. 2018, section 4.1), so that a few unlikely tokens do not decide an update.
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
