"""The metrics of a step: sums over this rank's tokens, added over ranks, and only then divided.

    batch_sums, update_sums -> reduce_sums -> batch_metrics, update_metrics
    (tensors of a rank)       (all ranks)     (means, under their names in metrics.jsonl)

A mean of means over micro-batches or ranks would weigh tokens by where they happened to be computed.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rayrlhf.algorithms.experience import GroupStatistics, Sampled
from rayrlhf.algorithms.losses import PolicyLoss, ValueLoss
from rayrlhf.models.ranks import Ranks

BATCH_SUMS = (
    "responses",
    "tokens",
    "tokens_squared",
    "score",
    "score_squared",
    "reward",
    "score_clipped",
    "log_ratio",
    "log_ratio_squared",
    "k3",
    "ended",
    "gap",
    "entropy",
    "returns",
    "returns_squared",
    "residual",
    "residual_squared",
    "importance",
    "importance_truncated",
    "groups",
    "groups_without_spread",
)
UPDATE_SUMS = (
    "tokens",
    "policy_loss",
    "value_loss",
    "squared_log_ratio",
    "ratio",
    "ratio_off_one",
    "clipped",
    "value_clipped",
)


def reduce_sums(sums: Mapping[str, Tensor], names: tuple[str, ...], ranks: Ranks) -> dict[str, float]:
    """Sums over all ranks.

    Args:
        sums: of this rank, scalars; a name that is missing counts as 0.
        names: of the result, in the order that all ranks use: they are added as one vector.
        ranks: which all call this.
    """
    zero = torch.zeros((), dtype=torch.float64, device=ranks.device)
    vector = torch.stack([sums.get(name, zero).double() for name in names])
    return dict(zip(names, ranks.sum(vector).tolist(), strict=True))


def batch_sums(
    sampled: Sampled, learned: Tensor, adjusted: Tensor, group: GroupStatistics, returns: Tensor | None
) -> dict[str, Tensor]:
    """Sums over the B responses of this rank, of at most R tokens, before the update.

    Args:
        sampled: the responses.
        learned: [B] their scores, of which some rewards may be normalised.
        adjusted: [B] the same, after `rl.reward_clip` and `rl.overlong_tokens`.
        group: of these scores.
        returns: [B, R], with a critic.
    """
    score, mask = sampled.scores, sampled.mask
    log_ratio = sampled.logprobs - sampled.ref_logprobs
    gap = (sampled.generator_logprobs - sampled.logprobs).abs()
    response_log_ratio = torch.where(mask, log_ratio, 0.0).double().sum(1)
    log_ratio = log_ratio[mask].double()
    sums = {
        "responses": mask.any(1).sum(),
        "tokens": mask.sum(),
        "tokens_squared": mask.sum(1).double().square().sum(),
        "score": score.double().sum(),
        "score_squared": score.double().square().sum(),
        "reward": adjusted.double().sum(),
        "score_clipped": (adjusted != learned).sum(),
        "log_ratio": response_log_ratio.sum(),
        "log_ratio_squared": response_log_ratio.square().sum(),
        # exp(-x) - 1 + x: an estimate of the same KL divergence that is never negative and varies less
        # (Schulman 2020, "Approximating KL divergence").
        "k3": (torch.expm1(-log_ratio) + log_ratio).sum(),
        "ended": sampled.ended.sum(),
        "gap": gap[mask].double().sum(),
        "entropy": sampled.entropy,
        # A group is on several ranks: each of its responses counts for its share.
        "groups": (1.0 / group.size).sum(),
        "groups_without_spread": ((group.std == 0) / group.size).sum(),
    }
    if returns is not None and sampled.values is not None:
        returns = returns[mask].double()
        residual = returns - sampled.values[mask].double()
        sums |= {
            "returns": returns.sum(),
            "returns_squared": returns.square().sum(),
            "residual": residual.sum(),
            "residual_squared": residual.square().sum(),
        }
    return sums


def importance_sums(weights: Tensor, mask: Tensor, limit: float) -> dict[str, Tensor]:
    """Sums of the importance weights.

    Args:
        weights: [B, R], all 1 if every token is sampled by the policy being trained.
        mask: [B, R] bool.
        limit: at which weights were truncated.
    """
    own = weights[mask].double()
    return {"importance": own.sum(), "importance_truncated": (own >= limit).sum()}


def update_sums(
    log_ratio: Tensor, policy_loss: Tensor, policy: PolicyLoss, value: ValueLoss | None
) -> dict[str, Tensor]:
    """Sums over the N tokens of a micro-batch, without gradient.

    Args:
        log_ratio: [N] log pi - log pi_old.
        policy_loss: scalar, the sum of the policy's loss as it is minimised, importance weights and KL included.
        policy: before weighting.
        value: with a critic.
    """
    log_ratio = log_ratio.detach()
    sums = {
        "tokens": torch.tensor(len(log_ratio)),
        "policy_loss": policy_loss.detach(),
        "squared_log_ratio": log_ratio.square().sum(),
        "ratio": policy.ratio.sum(),
        "ratio_off_one": (policy.ratio - 1.0).abs().sum(),
        "clipped": policy.clipped.sum(),
    }
    if value is not None:
        sums |= {"value_loss": value.loss.detach().sum(), "value_clipped": value.clipped.sum()}
    return sums


def batch_metrics(s: Mapping[str, float], beta: float, in_reward: bool, critic: bool) -> dict[str, float]:
    """Means over the batch of all ranks, before the update; docs/metrics.md has each of them.

    Args:
        s: sums by the names in `BATCH_SUMS`.
        beta: coefficient of the KL penalty.
        in_reward: whether the penalty is subtracted from the reward, and not in the loss.
        critic: whether there is a value model.

    Returns:
        By name in metrics.jsonl. Standard deviations are over responses.
    """
    n, tokens = s["responses"], s["tokens"]
    score, kl, length = s["score"] / n, s["log_ratio"] / n, tokens / n
    metrics = {
        "rl/responses": n,
        "rl/reward/mean": s["reward"] / n - (beta * kl if in_reward else 0.0),
        "rl/score/mean": score,
        "rl/score/std": max(0.0, s["score_squared"] / n - score**2) ** 0.5,
        "rl/score/clip_fraction": s["score_clipped"] / n,
        "rl/kl": kl,
        "rl/kl_std": max(0.0, s["log_ratio_squared"] / n - kl**2) ** 0.5,
        "rl/kl_k3": s["k3"] / n,
        "rl/kl_coefficient": beta,
        "rl/length/mean": length,
        "rl/length/std": max(0.0, s["tokens_squared"] / n - length**2) ** 0.5,
        "rl/eos_rate": s["ended"] / n,
        "rl/entropy": s["entropy"] / tokens,
        "rl/logprob_gap/mean": s["gap"] / tokens,
        "rl/importance_weight/mean": s["importance"] / tokens,
        "rl/importance_weight/truncated": s["importance_truncated"] / tokens,
        "rl/groups_without_spread": s["groups_without_spread"] / s["groups"],
    }
    if critic:
        return_variance = s["returns_squared"] / tokens - (s["returns"] / tokens) ** 2
        residual_variance = s["residual_squared"] / tokens - (s["residual"] / tokens) ** 2
        metrics["rl/explained_variance"] = 1.0 - residual_variance / max(return_variance, 1e-12)
    return metrics


def update_metrics(s: Mapping[str, float], critic: bool) -> dict[str, float]:
    """Means over the tokens of all updates of a step, by name in metrics.jsonl.

    Args:
        s: sums by the names in `UPDATE_SUMS`.
        critic: whether there is a value model.
    """
    tokens = s["tokens"]
    metrics = {
        "rl/policy_loss": s["policy_loss"] / tokens,
        "rl/approx_kl": 0.5 * s["squared_log_ratio"] / tokens,
        "rl/ratio/mean": s["ratio"] / tokens,
        "rl/clip_fraction": s["clipped"] / tokens,
    }
    if critic:
        metrics |= {
            "rl/value_loss": s["value_loss"] / tokens,
            "rl/value_clip_fraction": s["value_clipped"] / tokens,
        }
    return metrics
