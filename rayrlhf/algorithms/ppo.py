"""One PPO step on a batch of scored trajectories: experience, then epochs of clipped updates.

The equations live in `rayrlhf.algorithms.advantages` and `rayrlhf.algorithms.losses`; this file is their order.
Every rank knows the whole batch but computes only its own rows. Losses are divided by the token count of the *global*
mini-batch, so gradients do not depend on micro-batch size or on the number of workers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from rayrlhf.algorithms.advantages import generalized_advantages, kl_penalised_rewards, whiten
from rayrlhf.algorithms.kl import KLController
from rayrlhf.algorithms.losses import importance_weights, policy_loss, value_loss
from rayrlhf.algorithms.metrics import (
    BATCH_SUMS,
    UPDATE_SUMS,
    batch_metrics,
    batch_sums,
    importance_sums,
    reduce_sums,
    update_metrics,
)
from rayrlhf.algorithms.optimizer import Optimizer
from rayrlhf.config import PPOConfig
from rayrlhf.errors import UserError
from rayrlhf.models.attention import packs
from rayrlhf.models.batching import Row, TokenBatch, shard, token_batches
from rayrlhf.models.loading import autocast
from rayrlhf.models.logprobs import token_logprobs, token_logprobs_and_entropy, token_values
from rayrlhf.models.ranks import Ranks
from rayrlhf.rewards.functions import scores
from rayrlhf.trajectory import Trajectory, derive_seed


class Experience(NamedTuple):
    """What stays fixed over the epochs, for one trajectory of R response tokens; the tensors are [R]."""

    row: Row
    old_logprobs: Tensor
    old_values: Tensor
    advantages: Tensor
    returns: Tensor
    weights: Tensor
    """Of the policy loss: 1 where the trained policy itself has sampled."""


class PPO:
    """The policy, the value model, and how a batch of trajectories changes them."""

    def __init__(
        self,
        policy: PreTrainedModel,
        value_model: PreTrainedModel,
        config: PPOConfig,
        ranks: Ranks,
        *,
        pad_token_id: int,
        dtype: str,
        seed: int,
    ) -> None:
        self.policy, self.value_model = policy, value_model
        self.config, self.ranks, self.seed = config, ranks, seed
        self.pad_token_id, self.dtype = pad_token_id, dtype
        self.packed = packs(policy) and packs(value_model)
        updates = config.steps * config.epochs * config.minibatches
        self.policy_optimizer = Optimizer(policy, config.optimizer, updates)
        self.value_optimizer = Optimizer(value_model, config.optimizer, updates, lr=config.value_lr)
        self.kl = KLController(config.kl)

    def step(self, trajectories: Sequence[Trajectory], step: int) -> dict[str, float]:
        """Learn from one batch. Returns metrics over the global batch, the same on every rank.

        Raises:
            FloatingPointError: a score or a gradient is not finite, on every rank; the weights are those before the
                failing update.
        """
        prompts = [t.prompt_id for t in trajectories]
        own = shard([t.length for t in trajectories], self.ranks.world, prompts)[self.ranks.rank]
        experience, metrics = self.make_experience([trajectories[i] for i in own])
        by_index = dict(zip(own, experience, strict=True))
        # Every rank draws the same permutations of the global batch, so mini-batches do not depend on the sharding.
        permutations = np.random.default_rng(derive_seed(self.seed, "permutation", step))
        train_policy = step >= self.config.critic_warmup_steps
        sums: list[dict[str, Tensor]] = []
        norms: list[tuple[float, float]] = []
        stopped = False
        for _ in range(self.config.epochs):
            for minibatch in np.array_split(permutations.permutation(len(trajectories)), self.config.minibatches):
                if stopped:
                    self._skip()  # the schedule counts updates that the config asks for, made or not
                    continue
                tokens = sum(len(trajectories[i].response_ids) for i in minibatch)
                rows = [by_index[i] for i in minibatch if i in by_index]
                update_sums, norm = self.update(rows, tokens, train_policy)
                sums.append(update_sums)
                if norm is None:
                    stopped = True
                else:
                    norms.append(norm)
        first = reduce_sums(sums[0], UPDATE_SUMS, self.ranks)
        total = {name: torch.stack([s[name] for s in sums]).sum() for name in UPDATE_SUMS}
        metrics |= update_metrics(reduce_sums(total, UPDATE_SUMS, self.ranks))
        metrics["ppo/first_ratio_off_one"] = first["ratio_off_one"] / first["tokens"]
        metrics["ppo/grad_norm"], metrics["ppo/value_grad_norm"] = (float(x) for x in np.mean(norms, axis=0))
        metrics["ppo/lr"] = self.policy_optimizer.lr
        metrics["ppo/updates"] = float(len(norms))
        self.kl.update(metrics["ppo/kl"], len(trajectories))
        return metrics

    def make_experience(self, trajectories: Sequence[Trajectory]) -> tuple[list[Experience], dict[str, float]]:
        """Old log-probs and values (one pass without gradient), KL-penalised rewards, advantages and returns."""
        if not trajectories:
            raise UserError("a learner worker got no trajectory; use fewer workers or more prompts_per_step")
        rows = [Row.completion(t.prompt_ids, t.response_ids) for t in trajectories]
        logprobs, values = [torch.empty(0)] * len(rows), [torch.empty(0)] * len(rows)
        entropy = torch.zeros((), dtype=torch.float64, device=self.ranks.device)
        for indices, batch in self._micro_batches(rows):
            with torch.no_grad(), autocast(self.ranks.device, self.dtype):
                policy = token_logprobs_and_entropy(self.policy, batch, self.config.temperature)
                value = token_values(self.value_model, batch)
            entropy += policy.entropy.sum()
            split = zip(indices, policy.logprobs.split(batch.counts), value.split(batch.counts), strict=True)
            for i, logprob_row, value_row in split:
                logprobs[i], values[i] = logprob_row, value_row

        old_logprobs, mask = self._pad(logprobs)
        old_values, _ = self._pad(values)
        ref_logprobs, _ = self._pad([torch.from_numpy(_scored(t)) for t in trajectories])
        generator_logprobs, _ = self._pad([torch.from_numpy(t.generator_logprobs) for t in trajectories])
        score = scores(trajectories, self.config.missing_eos_reward).to(self.ranks.device)

        limit = self.config.reward_clip
        clipped_score = score if limit is None else score.clamp(-limit, limit)
        rewards = kl_penalised_rewards(clipped_score, old_logprobs, ref_logprobs, mask, self.kl.beta)
        if self.config.whiten_rewards:
            rewards = whiten(rewards, mask, self.ranks.sum, shift_mean=False)
        advantages, returns = generalized_advantages(rewards, old_values, mask, self.config.gamma, self.config.lam)
        gap = (generator_logprobs - old_logprobs).abs()
        ended = torch.tensor([t.finish_reason == "eos" for t in trajectories], device=self.ranks.device)
        log_ratio = old_logprobs - ref_logprobs
        weights = torch.ones_like(old_logprobs)
        if self.config.max_staleness:
            weights = importance_weights(old_logprobs, generator_logprobs, self.config.max_importance_weight)
        sums = batch_sums(score, clipped_score, log_ratio, gap, mask, returns, old_values, ended, entropy)
        sums |= importance_sums(weights, mask, self.config.max_importance_weight)
        metrics = batch_metrics(reduce_sums(sums, BATCH_SUMS, self.ranks), self.kl.beta)
        if not np.isfinite(metrics["ppo/score/mean"]):  # of all ranks, so that all of them stop
            raise FloatingPointError("a score of the batch is not finite; look at the reward model or function")
        metrics["ppo/logprob_gap/max"] = self.ranks.max(float(gap[mask].max()))

        if self.config.whiten_advantages:
            advantages = whiten(advantages, mask, self.ranks.sum)
        fixed = zip(rows, mask, old_logprobs, old_values, advantages, returns, weights, strict=True)
        return [Experience(row, *(x[m] for x in of_row)) for row, m, *of_row in fixed], metrics

    def update(
        self, rows: Sequence[Experience], tokens: int, train_policy: bool
    ) -> tuple[dict[str, Tensor], tuple[float, float] | None]:
        """One optimiser step of both models on this rank's rows of a mini-batch of `tokens` tokens over all ranks.

        Returns this rank's sums (`UPDATE_SUMS`) and the two gradient norms over all ranks. The norms are None, and no
        model has moved, if the policy is further than `max_approx_kl` from the one that sampled the mini-batch.
        """
        config = self.config
        sums = {name: torch.zeros((), dtype=torch.float64, device=self.ranks.device) for name in UPDATE_SUMS}
        for indices, batch in self._micro_batches([e.row for e in rows]):
            chosen = [rows[i] for i in indices]
            old_logprobs = torch.cat([e.old_logprobs for e in chosen])
            old_values = torch.cat([e.old_values for e in chosen])
            advantages = torch.cat([e.advantages for e in chosen])
            returns = torch.cat([e.returns for e in chosen])
            weights = torch.cat([e.weights for e in chosen])

            with torch.set_grad_enabled(train_policy), autocast(self.ranks.device, self.dtype):
                logprobs = token_logprobs(self.policy, batch, config.temperature)
            surrogate = policy_loss(logprobs, old_logprobs, advantages, config.clip_range)
            weighted = weights * surrogate.loss
            if train_policy:
                (weighted.sum() / tokens).backward()

            with autocast(self.ranks.device, self.dtype):
                values = token_values(self.value_model, batch)
            regression = value_loss(values, old_values, returns, config.value_clip_range)
            (config.value_coefficient * regression.loss.sum() / tokens).backward()

            log_ratio = (logprobs - old_logprobs).detach()
            sums["tokens"] += len(log_ratio)
            sums["policy_loss"] += weighted.detach().sum()
            sums["value_loss"] += regression.loss.detach().sum()
            sums["squared_log_ratio"] += log_ratio.square().sum()
            sums["ratio"] += surrogate.ratio.sum()
            sums["ratio_off_one"] += (surrogate.ratio - 1.0).abs().sum()
            sums["clipped"] += surrogate.clipped.sum()
            sums["value_clipped"] += regression.clipped.sum()
        if config.max_approx_kl is not None:
            approx_kl = 0.5 * float(self.ranks.sum(sums["squared_log_ratio"])) / tokens
            if approx_kl > config.max_approx_kl:
                self._skip()
                return sums, None
        # Both gradients are checked before either model moves: a failing update leaves both as they were.
        policy_norm = self.policy_optimizer.clip(self.ranks) if train_policy else 0.0
        value_norm = self.value_optimizer.clip(self.ranks)
        if train_policy:
            self.policy_optimizer.apply()
        else:
            self.policy_optimizer.skip()
        self.value_optimizer.apply()
        return sums, (policy_norm, value_norm)

    def _skip(self) -> None:
        self.policy_optimizer.skip()
        self.value_optimizer.skip()

    def state_dict(self) -> dict[str, Any]:
        """Optimisers, schedules and the KL controller; the models are saved beside it."""
        return {
            "policy_optimizer": self.policy_optimizer.state_dict(),
            "value_optimizer": self.value_optimizer.state_dict(),
            "beta": self.kl.beta,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.policy_optimizer.load_state_dict(state["policy_optimizer"])
        self.value_optimizer.load_state_dict(state["value_optimizer"])
        self.kl.beta = float(state["beta"])

    def _micro_batches(self, rows: Sequence[Row]) -> Iterator[tuple[list[int], TokenBatch]]:
        return token_batches(
            rows, self.config.micro_batch_tokens, self.pad_token_id, self.ranks.device, packed=self.packed
        )

    def _pad(self, rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """[B, R] rows padded on the right with zeros, and the mask of what is real."""
        mask = pad_sequence([torch.ones(len(row), dtype=torch.bool) for row in rows], batch_first=True)
        return pad_sequence([row.float() for row in rows], batch_first=True).to(self.ranks.device), mask.to(
            self.ranks.device
        )


def _scored(trajectory: Trajectory) -> Any:
    if trajectory.ref_logprobs is None:
        raise UserError(f"trajectory {trajectory.prompt_id}/{trajectory.sample_index} has no reference log-probs")
    return trajectory.ref_logprobs
