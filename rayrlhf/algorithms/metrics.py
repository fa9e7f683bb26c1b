"""The metrics of a PPO step: sums over this rank's tokens, added over ranks, and only then divided.

    batch_sums, update_sums -> reduce_sums -> batch_metrics, update_metrics
    (tensors of a rank)       (all ranks)     (means, under their names in metrics.jsonl)

A mean of means over micro-batches or ranks would weigh tokens by where they happened to be computed.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rayrlhf.algorithms.experience import Sampled
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


def batch_sums(sampled: Sampled, clipped_scores: Tensor, returns: Tensor) -> dict[str, Tensor]:
    """Sums over the B responses of this rank, of at most R tokens, before the update.

    Args:
        sampled: the responses.
        clipped_scores: [B] what the rewards are made of.
        returns: [B, R].
    """
    score, mask = sampled.scores, sampled.mask
    log_ratio = sampled.logprobs - sampled.ref_logprobs
    gap = (sampled.generator_logprobs - sampled.logprobs).abs()
    response_log_ratio = torch.where(mask, log_ratio, 0.0).double().sum(1)
    log_ratio, returns = log_ratio[mask].double(), returns[mask].double()
    residual = returns - sampled.values[mask].double()
    return {
        "responses": mask.any(1).sum(),
        "tokens": mask.sum(),
        "tokens_squared": mask.sum(1).double().square().sum(),
        "score": score.double().sum(),
        "score_squared": score.double().square().sum(),
        "reward": clipped_scores.double().sum(),
        "score_clipped": (clipped_scores != score).sum(),
        "log_ratio": response_log_ratio.sum(),
        "log_ratio_squared": response_log_ratio.square().sum(),
        # exp(-x) - 1 + x: an estimate of the same KL divergence that is never negative and varies less
        # (Schulman 2020, "Approximating KL divergence").
        "k3": (torch.expm1(-log_ratio) + log_ratio).sum(),
        "ended": sampled.ended.sum(),
        "gap": gap[mask].double().sum(),
        "entropy": sampled.entropy,
        "returns": returns.sum(),
        "returns_squared": returns.square().sum(),
        "residual": residual.sum(),
        "residual_squared": residual.square().sum(),
    }


def importance_sums(weights: Tensor, mask: Tensor, limit: float) -> dict[str, Tensor]:
    """Sums of the importance weights.

    Args:
        weights: [B, R], all 1 if every token is sampled by the policy being trained.
        mask: [B, R] bool.
        limit: at which weights were truncated.
    """
    own = weights[mask].double()
    return {"importance": own.sum(), "importance_truncated": (own >= limit).sum()}


def update_sums(log_ratio: Tensor, weighted_loss: Tensor, policy: PolicyLoss, value: ValueLoss) -> dict[str, Tensor]:
    """Sums over the N tokens of a micro-batch, without gradient.

    Args:
        log_ratio: [N] log pi - log pi_old.
        weighted_loss: [N] the policy's loss as it is minimised, importance weights included.
        policy: before weighting.
        value: as it is.
    """
    log_ratio = log_ratio.detach()
    return {
        "tokens": torch.tensor(len(log_ratio)),
        "policy_loss": weighted_loss.detach().sum(),
        "value_loss": value.loss.detach().sum(),
        "squared_log_ratio": log_ratio.square().sum(),
        "ratio": policy.ratio.sum(),
        "ratio_off_one": (policy.ratio - 1.0).abs().sum(),
        "clipped": policy.clipped.sum(),
        "value_clipped": value.clipped.sum(),
    }


def batch_metrics(s: Mapping[str, float], beta: float) -> dict[str, float]:
    """Means over the batch of all ranks, before the update; docs/metrics.md has each of them.

    Args:
        s: sums by the names in `BATCH_SUMS`.
        beta: coefficient of the KL penalty; the mean reward is the clipped score less the penalty.

    Returns:
        By name in metrics.jsonl. Standard deviations are over responses.
    """
    n, tokens = s["responses"], s["tokens"]
    score, kl, length = s["score"] / n, s["log_ratio"] / n, tokens / n
    return_variance = s["returns_squared"] / tokens - (s["returns"] / tokens) ** 2
    residual_variance = s["residual_squared"] / tokens - (s["residual"] / tokens) ** 2
    return {
        "ppo/responses": n,
        "ppo/reward/mean": s["reward"] / n - beta * kl,
        "ppo/score/mean": score,
        "ppo/score/std": max(0.0, s["score_squared"] / n - score**2) ** 0.5,
        "ppo/score/clip_fraction": s["score_clipped"] / n,
        "ppo/kl": kl,
        "ppo/kl_std": max(0.0, s["log_ratio_squared"] / n - kl**2) ** 0.5,
        "ppo/kl_k3": s["k3"] / n,
        "ppo/kl_coefficient": beta,
        "ppo/length/mean": length,
        "ppo/length/std": max(0.0, s["tokens_squared"] / n - length**2) ** 0.5,
        "ppo/eos_rate": s["ended"] / n,
        "ppo/entropy": s["entropy"] / tokens,
        "ppo/logprob_gap/mean": s["gap"] / tokens,
        "ppo/importance_weight/mean": s["importance"] / tokens,
        "ppo/importance_weight/truncated": s["importance_truncated"] / tokens,
        "ppo/explained_variance": 1.0 - residual_variance / max(return_variance, 1e-12),
    }


def update_metrics(s: Mapping[str, float]) -> dict[str, float]:
    """Means over the tokens of all updates of a step, by name in metrics.jsonl.

    Args:
        s: sums by the names in `UPDATE_SUMS`.
    """
    tokens = s["tokens"]
    return {
        "ppo/policy_loss": s["policy_loss"] / tokens,
        "ppo/value_loss": s["value_loss"] / tokens,
        "ppo/approx_kl": 0.5 * s["squared_log_ratio"] / tokens,
        "ppo/ratio/mean": s["ratio"] / tokens,
        "ppo/clip_fraction": s["clipped"] / tokens,
        "ppo/value_clip_fraction": s["value_clipped"] / tokens,
    }
