"""The coordinator: owns the pools of generators and scorers, hands prompts out and returns scored batches.

It lives outside Ray Train, so a restart of the learner does not cost the generators. It holds nothing that is lost
for good: prompts are a function of (seed, step), a learner that comes back publishes its weights again and says which
prompts it has had.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from actors.pools.monitoring import Status, export_status
from actors.pools.pool import Pool
from actors.pools.remote import ActorFailure, Remote, put, wait
from actors.rollouts.ahead import PLACES, Cursor, Limits, Rollouts
from actors.rollouts.batch import Batch, Counts
from actors.rollouts.in_turn import generate
from actors.rollouts.spawning import spawn_generator, spawn_scorer
from actors.rollouts.weight_sync import PublishedWeights
from rayrlhf.config import Config
from rayrlhf.data.prompts import EncodedPrompt, prompts_of_step, requests_for
from rayrlhf.data.rows import shard
from rayrlhf.errors import UserError
from rayrlhf.rewards.gold import GoldMeasure
from rayrlhf.runs.scaling import wanted_generators
from rayrlhf.trajectory import GenerationRequest, Sampling, SerializedTrajectory, Trajectory


class Coordinator:
    """One per run. Generators and scorers start when they are first asked for and serve all stages."""

    def __init__(self, config: Config, model: str, max_model_len: int, pad_token_id: int, local: bool) -> None:
        self.config, self.model, self.max_model_len, self.pad_token_id = config, model, max_model_len, pad_token_id
        self.local = local
        self.generators: Pool | None = None
        self.scorers: Pool | None = None
        self.scored_by: tuple[str, str] | None = None
        self.publication: PublishedWeights | None = None
        self.loaded: dict[str, int] = {}
        """Weight versions of generators, by name; `rollouts` knows better while there are any."""
        self.loading_s = 0.0
        self.version = 0
        self.prompts: list[EncodedPrompt] = []
        self.sampling: Sampling | None = None
        self.batch: Batch | None = None
        self.cursor = Cursor(0)
        self.rollouts: Rollouts | None = None
        self.reported = Counts()
        self.stopping = False
        self.followed_with: list[str] = []
        """The generators at the last batch."""
        if not local:
            export_status(config.name, self.status)

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
                partial(
                    spawn_generator,
                    config=self.config,
                    model=self.model,
                    max_model_len=self.max_model_len,
                    local=self.local,
                ),
                start_timeout_s=resources.start_timeout_s,
                call_timeout_s=resources.call_timeout_s,
                node_timeout_s=resources.wait_for_nodes_s,
                on_new=self._bring_up_to_date,
            )
        return self.generators.wait_until_ready()

    def start_scorers(self, reward_model: str, reference: str, gold: GoldMeasure | None = None) -> list[dict[str, Any]]:
        """Start scorers with these two models, in place of those with others.

        With `gold` they also have the labeller's measure of what they score.
        """
        models = (reward_model, reference)
        if self.scorers is not None and self.scored_by == models and gold is None:
            return self.scorers.broadcast("ready")
        if self.scorers is not None:
            self.scorers.stop()
        self.scored_by = models
        spawn = partial(
            spawn_scorer,
            config=self.config,
            reward_model=reward_model,
            reference=reference,
            pad_token_id=self.pad_token_id,
            gold=put(gold, self.local),
            local=self.local,
        )
        resources = self.config.resources
        self.scorers = Pool(
            "scorer",
            resources.scorers.count,
            spawn,
            start_timeout_s=resources.start_timeout_s,
            call_timeout_s=resources.call_timeout_s,
            node_timeout_s=resources.wait_for_nodes_s,
        )
        return self.scorers.wait_until_ready()

    # ---- weights

    def next_version(self, after: int = 0) -> int:
        """A weight version that no generator has seen: versions rise strictly, also past `after`."""
        self.version = max(self.version, after) + 1
        return self.version

    def load_weights(self, publication: PublishedWeights) -> int:
        """Load on every generator, or have it loaded while they go on generating for an asynchronous PPO."""
        if self.rollouts:
            self.rollouts.set_weights(publication)
            self.publication = publication
            return publication.version
        generators, started = self._started(), time.perf_counter()
        loaded = generators.broadcast("load_weights", publication)
        self.publication, self.loading_s = publication, time.perf_counter() - started
        self.loaded = {actor.name: version for actor, version in zip(generators.actors, loaded, strict=True)}
        if any(version != publication.version for version in loaded):
            raise ActorFailure(f"weights {publication.version} were published but the generators report {loaded}")
        return publication.version

    # ---- the size of the pools

    def scale(self, generators: int | None = None, scorers: int | None = None) -> dict[str, int]:
        """Want so many from now on: newcomers join when they are up, leavers finish their work first. None: as it is.

        Returns what is wanted of each.

        Raises:
            UserError: less than one, or a pool that has not started.
        """
        for pool, role, count in ((self.generators, "generators", generators), (self.scorers, "scorers", scorers)):
            if count is not None and count < 1:
                raise UserError(f"scale: {count} {role}; at least one is needed")
            if count is not None and pool is None:
                raise UserError(f"scale: the run has not started its {role} yet; set resources.{role}.count")
        for pool, count in ((self.generators, generators), (self.scorers, scorers)):
            if pool is not None and count is not None:
                pool.scale(count)
        return {pool.role: pool.wanted for pool in self._pools}

    def _follow_the_learner(self, metrics: dict[str, float]) -> None:
        """Grow or shrink the generators by what the last step took, where the config says so."""
        limits, generators = self.config.resources.generators.scale, self.generators
        if limits is None or generators is None:
            return
        names = [actor.name for actor in generators.actors]
        before, self.followed_with = self.followed_with, names
        if names and names == before and generators.steady:  # else part of the step was of other generators
            idle = statistics.fmean(metrics[f"idle/{name}"] for name in names)
            generators.scale(wanted_generators(len(names), metrics["rollout/learner_wait"], idle, limits))

    # ---- the end

    def request_stop(self) -> None:
        """The learner is to end after the step that it is in, with a checkpoint."""
        self.stopping = True

    def stop_requested(self) -> bool:
        return self.stopping

    # ---- work

    def generate(self, requests: Sequence[GenerationRequest], sampling: Sampling, version: int) -> list[Trajectory]:
        """One trajectory per request, in order, by generators that all have weight `version`."""
        if self.rollouts:
            raise ActorFailure("coordinator.generate was called while the generators work ahead of the learner")
        return [serialized.load() for serialized in generate(self._started(), requests, sampling, version)]

    def score(self, trajectories: Sequence[Trajectory], temperature: float) -> list[Trajectory]:
        """The trajectories with rewards and reference log-probs, in order."""
        if self.scorers is None:
            raise ActorFailure("coordinator.score was called before start_scorers")
        self.scorers.settle()
        lengths, prompts = [t.length for t in trajectories], [t.prompt_id for t in trajectories]
        shards = [rows for rows in shard(lengths, len(self.scorers), prompts) if rows]
        pieces = self.scorers.map("score", [[trajectories[i] for i in rows] for rows in shards], temperature)
        scored = {i: t for rows, piece in zip(shards, pieces, strict=True) for i, t in zip(rows, piece, strict=True)}
        return [scored[i] for i in range(len(trajectories))]

    def set_prompts(self, prompts: Sequence[EncodedPrompt], sampling: Sampling) -> None:
        """The prompts that `next_batch` draws from, and how."""
        self.prompts, self.sampling = list(prompts), sampling
        self.begin(Cursor(0))

    def begin(self, cursor: Cursor) -> None:
        """A learner starts, anew or from a checkpoint after which `cursor` was left."""
        self._end_rollouts()
        self.cursor, self.batch = cursor, None
        self._forget_deaths()
        self.reported = self._counts()

    def next_batch(self, step: int, version: int) -> Batch:
        """The scored batch of `step` for a learner whose weights are `version`, which have been published.

        With `ppo.max_staleness` 0 every token was sampled with these weights, by generators that wait for the learner
        otherwise; with k they go on meanwhile, and tokens are at most k versions old.
        Asking again for the same step and version (another rank, a retry) returns the same batch.
        """
        if self.batch is not None and (self.batch.step, self.batch.version) == (step, version):
            return self.batch
        serialized, metrics = self._ahead(step, version) if self._asynchronous else self._in_turn(step, version)
        if self.rollouts:
            self.cursor = self.rollouts.cursor()
            if self.cursor == Cursor(self.config.ppo.steps):
                self._end_rollouts()  # that was the last batch: the generators are free for other work
        else:
            self.cursor = Cursor(step + 1)
        batch = Batch.of(step, version, serialized, self.cursor, self.config.ppo.max_staleness)
        now, before = self._counts(), self.reported
        metrics |= now.since(before) | {"rollout/generators": float(len(self._started()))}
        seconds = metrics.get("time/generate", now.time - before.time)
        metrics["throughput/generated_tokens_per_s"] = sum(t.response_tokens for t in serialized) / seconds
        batch.metrics.update(metrics)
        self._follow_the_learner(metrics)
        self.reported, self.batch = now, batch
        self._forget_deaths()
        return batch

    def _forget_deaths(self) -> None:
        for pool in self._pools:
            pool.worked()

    def _in_turn(self, step: int, version: int) -> tuple[list[SerializedTrajectory], dict[str, float]]:
        assert self.sampling is not None, "set_prompts comes before next_batch"
        started = time.perf_counter()
        requests = [request for group in self._groups(step) for request in group]
        trajectories = self.generate(requests, self.sampling, version)
        generated = time.perf_counter()
        trajectories = self.score(trajectories, self.sampling.temperature)
        return [SerializedTrajectory.of(t) for t in trajectories], {
            "time/load_weights": self.loading_s,
            "time/generate": generated - started,
            "time/score": time.perf_counter() - generated,
        }

    def _ahead(self, step: int, version: int) -> tuple[list[SerializedTrajectory], dict[str, float]]:
        config, resources = self.config.ppo, self.config.resources
        if self.rollouts is None:
            if self.scorers is None or self.publication is None or self.publication.version != version:
                raise ActorFailure(f"next_batch of step {step}: scorers and weights {version} come before it")
            assert self.sampling is not None, "set_prompts comes before next_batch"
            self.rollouts = Rollouts(
                self._started(),
                self.scorers,
                self._groups,
                self.sampling,
                Limits(
                    steps=config.steps,
                    groups_per_step=config.prompts_per_step,
                    max_staleness=config.max_staleness,
                    # As many wait inside the engine or on their way: no place there is empty until the next slice.
                    generator_requests=resources.generators.max_num_seqs * 2,
                    score_tokens=resources.scorers.micro_batch_tokens,
                ),
                step=step,
                cursor=self.cursor,
                publication=self.publication,
                background=not self.local,
            )
        asked = time.monotonic()
        groups = self.rollouts.take(step, version, resources.newcomer_timeout_s + resources.call_timeout_s)
        taken = time.monotonic()
        return [t for group in groups for t in group.trajectories], {
            "rollout/learner_wait": (taken - asked) / (taken - self.reported.time)
        }

    def _end_rollouts(self) -> None:
        if self.rollouts:
            self.rollouts.stop()
            self.loaded = self.rollouts.versions()
            self.rollouts = None

    @property
    def _asynchronous(self) -> bool:
        return self.config.ppo.max_staleness > 0

    def _groups(self, step: int) -> list[list[GenerationRequest]]:
        """The requests of a step, by prompt."""
        config = self.config.ppo
        chosen = prompts_of_step(len(self.prompts), self.config.seed, step, config.prompts_per_step)
        prompts = [self.prompts[i] for i in chosen]
        requests = requests_for(prompts, config.samples_per_prompt, self.config.seed, "ppo", step)
        size = config.samples_per_prompt
        return [requests[i : i + size] for i in range(0, len(requests), size)]

    def stats(self) -> list[dict[str, Any]]:
        """What each generator has done so far."""
        calls = [actor.submit("stats") for actor in self.generators.actors] if self.generators else []
        return wait(calls, self.config.resources.call_timeout_s)

    def status(self) -> Status:
        """Where everything is at this moment. Other calls may be under way: nothing here waits for them."""
        rollouts = self.rollouts
        names = [actor.name for actor in self.generators.actors] if self.generators else []
        loaded = rollouts.versions() if rollouts else self.loaded
        return Status(
            version=self.version,
            versions={name: loaded[name] for name in names if name in loaded},
            groups=rollouts.groups() if rollouts else dict.fromkeys(PLACES, 0),
            actors={pool.role: len(pool) for pool in self._pools},
            wanted={pool.role: pool.wanted for pool in self._pools},
            replacements={pool.role: pool.deaths for pool in self._pools},
        )

    @property
    def _pools(self) -> list[Pool]:
        """Those that have been started; one whose actors have all died is one of them."""
        return [pool for pool in (self.generators, self.scorers) if pool is not None]

    def _started(self) -> Pool:
        """The generators. Once they have been up, a dead one is the pool's to replace, not an error of its start."""
        if self.generators is None:
            self.start_generators()
        assert self.generators is not None
        return self.generators

    def _counts(self) -> Counts:
        busy = {name: seconds for pool in self._pools for name, seconds in pool.busy_s().items()}
        return Counts(time.monotonic(), sum(pool.deaths for pool in self._pools), busy)

    def _bring_up_to_date(self, generator: Remote) -> None:
        if self.publication is not None:
            timeout_s = self.config.resources.call_timeout_s
            self.loaded[generator.name] = generator.call("load_weights", self.publication, timeout_s=timeout_s)
