"""PPO (Schulman et al. 2017): what one step learns from a batch of scored trajectories.

    once a step:            old log-probs and values -> rewards less the KL penalty -> advantages and returns
    epochs x mini-batches:  clipped policy loss, clipped value loss -> one optimiser step of each model

The equations live in `rayrlhf.algorithms.advantages` and `rayrlhf.algorithms.losses`; this file is their order.
Every rank knows the whole batch and computes only its own rows. A loss is divided by the number of tokens of the whole
mini-batch, of all ranks, so gradients depend neither on the size of micro-batches nor on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rayrlhf.algorithms.advantages import generalized_advantages, kl_penalised_rewards, whiten
from rayrlhf.algorithms.experience import Experience, Fixed, Sampled
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
    update_sums,
)
from rayrlhf.algorithms.optimizer import Optimizer
from rayrlhf.config import PPOConfig
from rayrlhf.data.rows import Row, shard
from rayrlhf.errors import UserError
from rayrlhf.models.batching import TokenBatch
from rayrlhf.models.forward import Forward
from rayrlhf.models.ranks import Ranks
from rayrlhf.trajectory import Trajectory, derive_seed


class PPO:
    """The policy, the value model, and how a batch of trajectories changes them."""

    def __init__(self, policy: Forward, value_model: Forward, config: PPOConfig, ranks: Ranks, *, seed: int) -> None:
        """Both models compute the same micro-batches, cut as `policy` cuts them.

        Args:
            policy: a causal language model.
            value_model: a model with a scalar head.
            config: of the whole run; its number of updates sets the length of the learning-rate schedule.
            ranks: the learner workers that share each batch.
            seed: of the permutations.
        """
        self.policy, self.value_model = policy, value_model
        self.config, self.ranks, self.seed = config, ranks, seed
        updates = config.steps * config.epochs * config.minibatches
        self.policy_optimizer = Optimizer(policy.model, config.optimizer, updates)
        self.value_optimizer = Optimizer(value_model.model, config.optimizer, updates, lr=config.value_lr)
        self.kl = KLController(config.kl)

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
        experience, metrics = self.make_experience([trajectories[i] for i in own])
        by_index = dict(zip(own, experience, strict=True))
        train_policy = step >= self.config.critic_warmup_steps
        sums: list[dict[str, Tensor]] = []
        norms: list[tuple[float, float]] = []
        stopped = False
        for minibatch in self._minibatches(len(trajectories), step):
            if stopped:
                self._skip()  # the schedule counts every update that the config asks for, made or not
                continue
            tokens = sum(len(trajectories[i].response_ids) for i in minibatch)
            rows = [by_index[i] for i in minibatch if i in by_index]
            found, norm = self.update(rows, tokens, train_policy)
            sums.append(found)
            if norm is None:
                stopped = True
            else:
                norms.append(norm)
        first = reduce_sums(sums[0], UPDATE_SUMS, self.ranks)
        total = {name: torch.stack([s[name] for s in sums]).sum() for name in UPDATE_SUMS}
        metrics |= update_metrics(reduce_sums(total, UPDATE_SUMS, self.ranks))
        # Before the first update the policy is the old one, so every ratio is 1 but for rounding. A larger value here
        # means that the two passes compute different things.
        metrics["ppo/first_ratio_off_one"] = first["ratio_off_one"] / first["tokens"]
        metrics["ppo/grad_norm"], metrics["ppo/value_grad_norm"] = (float(x) for x in np.mean(norms, axis=0))
        metrics["ppo/lr"] = self.policy_optimizer.lr
        metrics["ppo/updates"] = float(len(norms))
        self.kl.update(metrics["ppo/kl"], len(trajectories))
        return metrics

    def make_experience(self, trajectories: Sequence[Trajectory]) -> tuple[list[Experience], dict[str, float]]:
        """Old log-probs and values (one pass without gradient), rewards, advantages and returns.

        Args:
            trajectories: this rank's B, with responses of at most R tokens.

        Returns:
            One experience for each trajectory, in their order; and metrics over the batch of all ranks.

        Raises:
            UserError: no trajectory, or one that was never scored.
            FloatingPointError: a score of any rank is not finite.
        """
        if not trajectories:
            raise UserError("a learner worker got no trajectory; use fewer workers or more prompts_per_step")
        config = self.config
        rows = [Row.completion(t.prompt_ids, t.response_ids) for t in trajectories]
        logprobs, values, entropy = self._first_pass(rows)
        sampled = Sampled.of(trajectories, logprobs, values, entropy, config.missing_eos_reward)
        mask = sampled.mask

        # Ziegler et al. 2019, equation 2: the score less the KL penalty, token by token.
        limit = config.reward_clip
        scores = sampled.scores if limit is None else sampled.scores.clamp(-limit, limit)
        rewards = kl_penalised_rewards(scores, sampled.logprobs, sampled.ref_logprobs, mask, self.kl.beta)
        if config.whiten_rewards:
            # Their mean is kept: without it a response would gain or lose by its length.
            rewards = whiten(rewards, mask, self.ranks.sum, shift_mean=False)
        # Schulman et al. 2016, equation 16; the returns are the value model's targets.
        advantages, returns = generalized_advantages(rewards, sampled.values, mask, config.gamma, config.lam)
        weights = torch.ones_like(sampled.logprobs)
        if config.max_staleness:
            # Only then may a token come from an older policy. Otherwise generator and learner differ by rounding.
            weights = importance_weights(sampled.logprobs, sampled.generator_logprobs, config.max_importance_weight)

        sums = batch_sums(sampled, scores, returns) | importance_sums(weights, mask, config.max_importance_weight)
        metrics = batch_metrics(reduce_sums(sums, BATCH_SUMS, self.ranks), self.kl.beta)
        if not np.isfinite(metrics["ppo/score/mean"]):  # of all ranks, so that all of them stop
            raise FloatingPointError("a score of the batch is not finite; look at the reward model or function")
        gap = (sampled.generator_logprobs - sampled.logprobs).abs()
        metrics["ppo/logprob_gap/max"] = self.ranks.max(float(gap[mask].max()))

        if config.whiten_advantages:
            # Not before the returns are taken: the value model learns them as they are.
            advantages = whiten(advantages, mask, self.ranks.sum)
        tensors = zip(sampled.logprobs, sampled.values, advantages, returns, weights, strict=True)
        return [
            Experience(row, Fixed(*(tensor[valid] for tensor in of_row)))
            for row, valid, of_row in zip(rows, mask, tensors, strict=True)
        ], metrics

    def update(
        self, rows: Sequence[Experience], tokens: int, train_policy: bool
    ) -> tuple[dict[str, Tensor], tuple[float, float] | None]:
        """One optimiser step of both models.

        Args:
            rows: this rank's part of a mini-batch, which may be empty.
            tokens: response tokens of the mini-batch on all ranks.
            train_policy: False trains the value model only.

        Returns:
            This rank's sums (`UPDATE_SUMS`), and the gradient norms of policy and value model over all ranks. The norms
            are None, and no model has moved, if the policy is further than `max_approx_kl` from the old one.

        Raises:
            FloatingPointError: a gradient norm is not finite; no model has moved.
        """
        config = self.config
        sums = {name: torch.zeros((), dtype=torch.float64, device=self.ranks.device) for name in UPDATE_SUMS}
        for indices, batch in self.policy.batches([e.row for e in rows], beside=[self.value_model]):
            fixed = Fixed.joined([rows[i].fixed for i in indices])

            with torch.set_grad_enabled(train_policy):
                logprobs = self.policy.logprobs(batch, config.temperature)
            # Schulman et al. 2017, equation 7; importance-weighted for tokens of an older policy.
            surrogate = policy_loss(logprobs, fixed.old_logprobs, fixed.advantages, config.clip_range)
            weighted = fixed.weights * surrogate.loss
            if train_policy:
                (weighted.sum() / tokens).backward()

            # The policy's graph is gone by now: only one model's activations are held at a time.
            values = self.value_model.values(batch)
            regression = value_loss(values, fixed.old_values, fixed.returns, config.value_clip_range)
            (config.value_coefficient * regression.loss.sum() / tokens).backward()

            for name, value in update_sums(logprobs - fixed.old_logprobs, weighted, surrogate, regression).items():
                sums[name] += value
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

    def _minibatches(self, count: int, step: int) -> Iterator[NDArray[np.int64]]:
        """Indices into the whole batch of `count` trajectories, for each update of a step.

        Every rank draws the same permutations of the whole batch, so mini-batches do not depend on the sharding.
        """
        permutations = np.random.default_rng(derive_seed(self.seed, "permutation", step))
        for _ in range(self.config.epochs):
            yield from np.array_split(permutations.permutation(count), self.config.minibatches)

    def _first_pass(self, rows: Sequence[Row]) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Log-probs and values of each row's tokens before any update, and the sum of the entropy of all tokens."""
        entropy = torch.zeros((), dtype=torch.float64, device=self.ranks.device)

        def measure(batch: TokenBatch) -> Iterator[tuple[Tensor, Tensor]]:
            found = self.policy.logprobs_and_entropy(batch, self.config.temperature)
            entropy.add_(found.entropy.sum())
            values = self.value_model.values(batch)
            return zip(found.logprobs.split(batch.counts), values.split(batch.counts), strict=True)

        pairs = self.policy.each_row(rows, measure, beside=[self.value_model])
        return [logprobs for logprobs, _ in pairs], [values for _, values in pairs], entropy

    def _skip(self) -> None:
        self.policy_optimizer.skip()
        self.value_optimizer.skip()
