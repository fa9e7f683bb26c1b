"""The coordinator: owns the pools of generators and scorers, hands prompts out and returns scored batches.

It lives outside Ray Train, so a restart of the learner does not cost the generators. It holds nothing that is lost
for good: prompts are a function of (seed, step), and the learner publishes its weights again when it comes back.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from actors.engine import environment
from actors.generator import Generator
from actors.pool import Pool
from actors.remote import ActorFailure, Remote, namespace, put
from actors.scorer import Scorer
from actors.weight_sync import Publication
from rayrlhf.batching import shard
from rayrlhf.config import Config
from rayrlhf.gold import Gold
from rayrlhf.prompts import EncodedPrompt, prompts_of_step, requests_for
from rayrlhf.trajectory import GenerationRequest, Sampling, Trajectory


@dataclass(frozen=True)
class Batch:
    """A step's scored trajectories and what making them took."""

    step: int
    version: int
    trajectories: list[Trajectory]
    metrics: dict[str, float]


class Coordinator:
    """One per run. Generators and scorers start when they are first asked for and serve all stages."""

    def __init__(self, config: Config, model: str, max_model_len: int, pad_token_id: int, local: bool) -> None:
        self.config, self.model, self.max_model_len, self.pad_token_id = config, model, max_model_len, pad_token_id
        self.local = local
        self.generators: Pool | None = None
        self.scorers: Pool | None = None
        self.scored_by: tuple[str, str] | None = None
        self.publication: Publication | None = None
        self.version = 0
        self.prompts: list[EncodedPrompt] = []
        self.sampling: Sampling | None = None
        self.batch: Batch | None = None
        self.reported_replacements = 0

    def __repr__(self) -> str:
        return "coordinator"

    # ---- the pools

    def start_generators(self) -> list[dict[str, Any]]:
        """Start the generators unless they run; returns who and where they are."""
        if self.generators is None:
            resources = self.config.resources
            self.generators = Pool(
                "generator",
                resources.generators.count,
                self._spawn_generator,
                start_timeout_s=resources.start_timeout_s,
                call_timeout_s=resources.call_timeout_s,
                on_replaced=self._bring_up_to_date,
            )
        return self.generators.wait_until_ready()

    def start_scorers(self, reward_model: str, reference: str, gold: Gold | None = None) -> list[dict[str, Any]]:
        """Start scorers with these two models, in place of those with others.

        With `gold` they also have the labeller's measure of what they score.
        """
        models = (reward_model, reference)
        if self.scorers is not None and self.scored_by == models and gold is None:
            return self.scorers.broadcast("ready")
        if self.scorers is not None:
            self.scorers.stop()
        self.scored_by = models
        shared = put(gold, self.local)
        resources = self.config.resources
        settings = resources.scorers

        def spawn(name: str) -> Remote:
            return Remote.spawn(
                name,
                Scorer,
                name,
                reward_model,
                reference,
                settings,
                local=self.local,
                options={
                    "num_cpus": settings.cpus,
                    "num_gpus": settings.gpus,
                    "namespace": namespace(self.config),
                },
                gold=shared,  # Ray hands the actor what is behind a reference
                pad_token_id=self.pad_token_id,
                dtype=self.config.model.dtype,
            )

        self.scorers = Pool(
            "scorer",
            settings.count,
            spawn,
            start_timeout_s=resources.start_timeout_s,
            call_timeout_s=resources.call_timeout_s,
        )
        return self.scorers.wait_until_ready()

    # ---- weights

    def next_version(self, after: int = 0) -> int:
        """A weight version that no generator has seen: versions rise strictly, also past `after`."""
        self.version = max(self.version, after) + 1
        return self.version

    def load_weights(self, publication: Publication) -> int:
        """Load on every generator; returns when all of them have the new version."""
        generators = self._started()
        self.publication = None  # whoever replaces a generator during the broadcast gets the weights by the broadcast
        loaded = generators.broadcast("load_weights", publication)
        self.publication = publication
        if any(version != publication.version for version in loaded):
            raise ActorFailure(f"weights {publication.version} were published but the generators report {loaded}")
        return publication.version

    # ---- work

    def generate(self, requests: Sequence[GenerationRequest], sampling: Sampling, version: int) -> list[Trajectory]:
        """One trajectory per request, in order, by generators that all have weight `version`."""
        generators = self._started()
        # Consecutive requests stay together: samples of one prompt share its prefix in a generator's cache.
        size = -(-len(requests) // len(generators))
        pieces = [list(requests[i : i + size]) for i in range(0, len(requests), size)]
        return [t for piece in generators.map("generate", pieces, sampling, version) for t in piece]

    def score(self, trajectories: Sequence[Trajectory], temperature: float) -> list[Trajectory]:
        """The trajectories with rewards and reference log-probs, in order."""
        if self.scorers is None:
            raise ActorFailure("coordinator.score was called before start_scorers")
        shards = [rows for rows in shard([t.length for t in trajectories], len(self.scorers)) if rows]
        pieces = self.scorers.map("score", [[trajectories[i] for i in rows] for rows in shards], temperature)
        scored = {i: t for rows, piece in zip(shards, pieces, strict=True) for i, t in zip(rows, piece, strict=True)}
        return [scored[i] for i in range(len(trajectories))]

    def set_prompts(self, prompts: Sequence[EncodedPrompt], sampling: Sampling) -> None:
        """The prompts that `next_batch` draws from, and how."""
        self.prompts, self.sampling, self.batch = list(prompts), sampling, None
        self.reported_replacements = self._replacements()

    def next_batch(self, step: int, version: int) -> Batch:
        """The scored batch of `step`, every token sampled with weights `version` (synchronous PPO).

        Asking again for the same step and version (another rank, a retry) returns the same batch.
        """
        if self.batch is not None and (self.batch.step, self.batch.version) == (step, version):
            return self.batch
        assert self.sampling is not None, "set_prompts comes before next_batch"
        config = self.config.ppo
        chosen = prompts_of_step(len(self.prompts), self.config.seed, step, config.prompts_per_step)
        requests = requests_for(
            [self.prompts[i] for i in chosen], config.samples_per_prompt, self.config.seed, "ppo", step
        )
        started = time.perf_counter()
        trajectories = self.generate(requests, self.sampling, version)
        generated = time.perf_counter()
        trajectories = self.score(trajectories, self.sampling.temperature)
        tokens = sum(len(t.response_ids) for t in trajectories)
        metrics = {
            "time/generate": generated - started,
            "time/score": time.perf_counter() - generated,
            "throughput/generated_tokens_per_s": tokens / (generated - started),
            # Since the last batch: also those that died while weights were loaded.
            "rollout/replacements": float(self._replacements() - self.reported_replacements),
        }
        gold = [t.gold for t in trajectories if t.gold is not None]
        if gold:
            metrics |= {"ppo/gold/mean": statistics.fmean(gold), "ppo/gold/std": statistics.pstdev(gold)}
        self.reported_replacements = self._replacements()
        self.batch = Batch(step, version, trajectories, metrics)
        return self.batch

    def stats(self) -> list[dict[str, Any]]:
        """What each generator has done so far."""
        return self.generators.broadcast("stats") if self.generators else []

    def _started(self) -> Pool:
        """The generators. Once they have been up, a dead one is the pool's to replace, not an error of its start."""
        if self.generators is None:
            self.start_generators()
        assert self.generators is not None
        return self.generators

    def _replacements(self) -> int:
        return sum(pool.replacements for pool in (self.generators, self.scorers) if pool)

    def _spawn_generator(self, name: str) -> Remote:
        settings = self.config.resources.generators
        model = self.config.model.model_copy(update={"path": self.model})
        return Remote.spawn(
            name,
            Generator,
            name,
            model,
            settings,
            self.max_model_len,
            self.config.seed,
            local=self.local,
            options={
                "num_cpus": settings.cpus,
                "num_gpus": settings.gpus,
                "namespace": namespace(self.config),
                "runtime_env": {"env_vars": environment(settings)},  # OpenMP reads its settings as a process starts
            },
        )

    def _bring_up_to_date(self, generator: Remote) -> None:
        if self.publication is not None:
            generator.call("load_weights", self.publication, timeout_s=self.config.resources.call_timeout_s)
