"""One step of reinforcement learning: what a policy learns from a batch of scored trajectories.

    once a step:            old log-probs (and values) -> scores -> advantages (and returns)
    epochs x mini-batches:  policy loss (and value loss) -> one optimiser step of each model

The equations are an algorithm's (`rayrlhf.algorithms.ppo`, `grpo`, `rloo`, `reinforce_pp`); this file is their order.
Every rank knows the whole batch and computes only its own rows. A loss is divided by the number of tokens, or of
responses, of the whole mini-batch, of all ranks. So gradients depend neither on the size of micro-batches nor on the
number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rayrlhf.algorithms.base import Algorithm
from rayrlhf.algorithms.critic import Critic
from rayrlhf.algorithms.experience import Experience, Fixed, Groups, Sampled
from rayrlhf.algorithms.kl import KLController
from rayrlhf.algorithms.losses import KL_ESTIMATORS, importance_weights
from rayrlhf.algorithms.metrics import (
    BATCH_SUMS,
    UPDATE_SUMS,
    batch_metrics,
    batch_sums,
    importance_sums,
    reduce_sums,
    update_metrics,
    update_sums,
)
from rayrlhf.algorithms.optimizer import Optimizer
from rayrlhf.config_rl import RLConfig
from rayrlhf.data.rows import Row, shard
from rayrlhf.errors import UserError
from rayrlhf.models.batching import TokenBatch
from rayrlhf.models.forward import Forward
from rayrlhf.models.ranks import Ranks
from rayrlhf.rewards.functions import learned_scores
from rayrlhf.trajectory import Trajectory, derive_seed

LOOKED_AT = 4
"""So many trajectories of the newest batch are kept to look at."""


class MiniBatch(NamedTuple):
    """How much one update learns from, on all ranks."""

    tokens: int
    """response tokens"""
    responses: int


class Trainer:
    """The policy, a critic if the algorithm has one, and how a batch of trajectories changes them."""

    def __init__(
        self,
        algorithm: Algorithm,
        policy: Forward,
        critic: Critic | None,
        config: RLConfig,
        ranks: Ranks,
        *,
        max_response_tokens: int,
        seed: int,
        normalized: Mapping[str, float] | None = None,
    ) -> None:
        """Both models compute the same micro-batches, cut as `policy` cuts them.

        Args:
            algorithm: whose equations these are.
            policy: a causal language model.
            critic: None if the algorithm has none.
            config: of the whole run; its number of updates sets the length of the learning-rate schedule.
            ranks: the learner workers that share each batch.
            max_response_tokens: at which generators stop.
            seed: of the permutations.
            normalized: weights of the rewards that are normalised, by name, see `learned_scores`.
        """
        self.algorithm, self.policy, self.critic = algorithm, policy, critic
        self.config, self.ranks, self.seed = config, ranks, seed
        self.max_response_tokens, self.normalized = max_response_tokens, normalized or {}
        self.policy_optimizer = Optimizer(policy.model, config.optimizer, updates_of(config))
        self.kl = KLController(config.kl)
        self.looked_at: list[tuple[Trajectory, Fixed]] = []
        """The first of this rank's trajectories of the newest batch, with what was learnt from each token."""

    def step(self, trajectories: Sequence[Trajectory], step: int) -> dict[str, float]:
        """Learn from one batch, which is the same on every rank.

        Args:
            trajectories: scored, with the reference policy's log-probs.
            step: counted from 0; it seeds the permutations.

        Returns:
            Metrics over the batch of all ranks, the same on every rank.

        Raises:
            UserError: a rank got no trajectory, or a trajectory was never scored.
            FloatingPointError: a score or a gradient is not finite, on every rank; the weights are those before the
                failing update.
        """
        prompts = [t.prompt_id for t in trajectories]
        own = shard([t.length for t in trajectories], self.ranks.world, prompts)[self.ranks.rank]
        groups = Groups.of(prompts, own, self.ranks.device, self.ranks.sum)
        learned = self.learned_scores(trajectories)[own]
        experience, metrics = self.make_experience([trajectories[i] for i in own], groups, learned)
        by_index = dict(zip(own, experience, strict=True))
        self.looked_at = [(trajectories[i], by_index[i].fixed) for i in own[:LOOKED_AT]]
        train_policy = self.critic is None or step >= self.critic.config.critic_warmup_steps
        sums: list[dict[str, Tensor]] = []
        norms: list[tuple[float, ...]] = []
        stopped = False
        for minibatch in self._minibatches(len(trajectories), step):
            if stopped:
                self._skip()  # the schedule counts every update that the config asks for, made or not
                continue
            whole = MiniBatch(sum(trajectories[i].written_tokens for i in minibatch), len(minibatch))
            rows = [by_index[i] for i in minibatch if i in by_index]
            found, norm = self.update(rows, whole, train_policy)
            sums.append(found)
            if norm is None:
                stopped = True
            else:
                norms.append(norm)
        first = reduce_sums(sums[0], UPDATE_SUMS, self.ranks)
        total = {name: torch.stack([s[name] for s in sums]).sum() for name in UPDATE_SUMS}
        metrics |= update_metrics(reduce_sums(total, UPDATE_SUMS, self.ranks), critic=self.critic is not None)
        # Before the first update the policy is the old one, so every ratio is 1 but for rounding. A larger value here
        # means that the two passes compute different things.
        metrics["rl/first_ratio_off_one"] = first["ratio_off_one"] / first["tokens"]
        names = ("rl/grad_norm", "rl/value_grad_norm")
        metrics |= {name: float(norm) for name, norm in zip(names, np.mean(norms, axis=0), strict=False)}
        metrics["rl/lr"] = self.policy_optimizer.lr
        metrics["rl/updates"] = float(len(norms))
        self.kl.update(metrics["rl/kl"], len(trajectories))
        return metrics

    def make_experience(
        self, trajectories: Sequence[Trajectory], groups: Groups | None = None, learned: Tensor | None = None
    ) -> tuple[list[Experience], dict[str, float]]:
        """Old log-probs and values (one pass without gradient), scores, advantages and returns.

        Args:
            trajectories: this rank's B, with responses of at most R tokens.
            groups: which responses of the whole batch have the same prompt; None if this rank has them all.
            learned: [B] their `learned_scores`, as the whole batch gives them; None if this rank has it all.

        Returns:
            One experience for each trajectory, in their order; and metrics over the batch of all ranks.

        Raises:
            UserError: no trajectory, or one that was never scored.
            FloatingPointError: a score of any rank is not finite.
        """
        if not trajectories:
            raise UserError("a learner worker got no trajectory; use fewer workers or more prompts_per_step")
        config, ranks = self.config, self.ranks
        if groups is None:
            prompts = [t.prompt_id for t in trajectories]
            groups = Groups.of(prompts, range(len(prompts)), ranks.device, ranks.sum)
        rows = [Row.of(t) for t in trajectories]
        logprobs, values, entropy = self._first_pass(rows)
        sampled = Sampled.of(trajectories, logprobs, values, entropy, config.missing_eos_reward)
        mask = sampled.mask
        learned = (self.learned_scores(trajectories) if learned is None else learned).to(ranks.device)
        scores = self._adjusted_scores(learned, mask)

        beta = self.kl.beta if config.kl.estimator == "k1" else 0.0
        advantages, returns = self.algorithm.advantages(sampled, scores, groups, beta, ranks.sum)
        if self.critic and returns is None:
            raise UserError(f"{type(self.algorithm).__name__}.advantages gave no returns, which the critic learns from")
        weights = torch.ones_like(sampled.logprobs)
        if config.max_staleness:
            # Only then may a token come from an older policy. Otherwise generator and learner differ by rounding.
            weights = importance_weights(sampled.logprobs, sampled.generator_logprobs, config.max_importance_weight)

        sums = batch_sums(sampled, learned, scores, groups.statistics(scores), returns)
        sums |= importance_sums(weights, mask, config.max_importance_weight)
        reduced = reduce_sums(sums, BATCH_SUMS, ranks)
        metrics = batch_metrics(reduced, self.kl.beta, config.kl.estimator == "k1", self.critic is not None)
        if not np.isfinite(metrics["rl/score/mean"]):  # of all ranks, so that all of them stop
            raise FloatingPointError("a score of the batch is not finite; look at the reward model or function")
        gap = (sampled.generator_logprobs - sampled.logprobs).abs()
        metrics["rl/logprob_gap/max"] = ranks.max(float(gap[mask].max()))

        tensors = Fixed(sampled.logprobs, sampled.ref_logprobs, advantages, weights, sampled.values, returns)
        return [
            Experience(row, Fixed._make(None if tensor is None else tensor[i][mask[i]] for tensor in tensors))
            for i, row in enumerate(rows)
        ], metrics

    def update(
        self, rows: Sequence[Experience], whole: MiniBatch, train_policy: bool = True
    ) -> tuple[dict[str, Tensor], tuple[float, ...] | None]:
        """One optimiser step of both models.

        Args:
            rows: this rank's part of a mini-batch, which may be empty.
            whole: the mini-batch of all ranks.
            train_policy: False trains the critic only.

        Returns:
            This rank's sums (`UPDATE_SUMS`), and the gradient norms of policy and critic over all ranks. The norms
            are None, and no model has moved, if the policy is further than `max_approx_kl` from the old one.

        Raises:
            FloatingPointError: a gradient norm is not finite; no model has moved.
        """
        config, critic = self.config, self.critic
        sums = {name: torch.zeros((), dtype=torch.float64, device=self.ranks.device) for name in UPDATE_SUMS}
        beside = [critic.forward] if critic else []
        for indices, batch in self.policy.batches([e.row for e in rows], beside=beside):
            fixed = Fixed.joined([rows[i].fixed for i in indices])

            with torch.set_grad_enabled(train_policy):
                logprobs = self.policy.logprobs(batch, config.temperature)
            surrogate = self.algorithm.policy_loss(logprobs, fixed, batch.counts)
            # Importance-weighted for tokens of an older policy.
            loss = fixed.weights * surrogate.loss
            if config.kl.estimator != "k1":
                loss = loss + self.kl.beta * KL_ESTIMATORS[config.kl.estimator](logprobs - fixed.ref_logprobs)
            total, count = self._total(loss, batch.counts, whole)
            if train_policy:
                (total / count).backward()

            value = None
            if critic:
                # The policy's graph is gone by now: only one model's activations are held at a time.
                assert fixed.old_values is not None and fixed.returns is not None
                value = critic.backward(batch, fixed.old_values, fixed.returns, whole.tokens)
            total = total * (whole.tokens / count)  # as a sum over tokens, for a mean over tokens
            for name, of_batch in update_sums(logprobs - fixed.old_logprobs, total, surrogate, value).items():
                sums[name] += of_batch
        if config.max_approx_kl is not None:
            approx_kl = 0.5 * float(self.ranks.sum(sums["squared_log_ratio"])) / whole.tokens
            if approx_kl > config.max_approx_kl:
                self._skip()
                return sums, None
        # All gradients are checked before a model moves: a failing update leaves both as they were.
        norms = [self.policy_optimizer.clip(self.ranks) if train_policy else 0.0]
        if critic:
            norms.append(critic.optimizer.clip(self.ranks))
        if train_policy:
            self.policy_optimizer.apply()
        else:
            self.policy_optimizer.skip()
        if critic:
            critic.optimizer.apply()
        return sums, tuple(norms)

    def state_dict(self) -> dict[str, Any]:
        """Optimisers, schedules and the KL controller; the models are saved beside it."""
        return {
            "policy_optimizer": self.policy_optimizer.state_dict(),
            "critic": self.critic.state_dict() if self.critic else None,
            "beta": self.kl.beta,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.policy_optimizer.load_state_dict(state["policy_optimizer"])
        if self.critic:
            self.critic.load_state_dict(state["critic"])
        self.kl.beta = float(state["beta"])

    def learned_scores(self, trajectories: Sequence[Trajectory]) -> Tensor:
        """[whole batch] the scores that the policy learns from, before `_adjusted_scores`."""
        return learned_scores(trajectories, self.config.missing_eos_reward, self.normalized)

    def _adjusted_scores(self, scores: Tensor, mask: Tensor) -> Tensor:
        """[B] the scores after `rl.reward_clip`, and less the punishment by `rl.overlong_tokens`."""
        config = self.config
        if config.reward_clip is not None:
            scores = scores.clamp(-config.reward_clip, config.reward_clip)
        if config.overlong_tokens is not None:
            # Yu et al. 2025 (DAPO), equation 13.
            free = self.max_response_tokens - config.overlong_tokens
            scores = scores - ((mask.sum(1) - free) / config.overlong_tokens).clamp(0.0, 1.0)
        return scores

    def _total(self, loss: Tensor, counts: Sequence[int], whole: MiniBatch) -> tuple[Tensor, int]:
        """What to add up of [N] losses of tokens, and by what to divide the sum over all micro-batches and ranks."""
        if self.config.loss_mean == "response":
            return torch.stack([each.mean() for each in loss.split(list(counts))]).sum(), whole.responses
        if self.config.loss_mean == "constant":
            return loss.sum(), whole.responses * self.max_response_tokens
        return loss.sum(), whole.tokens

    def _minibatches(self, count: int, step: int) -> Iterator[NDArray[np.int64]]:
        """Indices into the whole batch of `count` trajectories, for each update of a step.

        Every rank draws the same permutations of the whole batch, so mini-batches do not depend on the sharding.
        """
        permutations = np.random.default_rng(derive_seed(self.seed, "permutation", step))
        for _ in range(self.config.epochs):
            yield from np.array_split(permutations.permutation(count), self.config.minibatches)

    def _first_pass(self, rows: Sequence[Row]) -> tuple[list[Tensor], list[Tensor] | None, Tensor]:
        """Log-probs and values of each row's tokens before any update, and the sum of the entropy of all tokens."""
        entropy = torch.zeros((), dtype=torch.float64, device=self.ranks.device)
        critic = self.critic

        def measure(batch: TokenBatch) -> Iterator[tuple[Tensor, Tensor | None]]:
            found = self.policy.logprobs_and_entropy(batch, self.config.temperature)
            entropy.add_(found.entropy.sum())
            values = critic.values(batch) if critic else [None] * len(batch.counts)
            return zip(found.logprobs.split(batch.counts), values, strict=True)

        pairs = self.policy.each_row(rows, measure, beside=[critic.forward] if critic else [])
        logprobs = [of_row for of_row, _ in pairs]
        return logprobs, [values for _, values in pairs if values is not None] if critic else None, entropy

    def _skip(self) -> None:
        self.policy_optimizer.skip()
        if self.critic:
            self.critic.optimizer.skip()


def updates_of(config: RLConfig) -> int:
    """Optimiser steps of a whole run."""
    return config.steps * config.epochs * config.minibatches
