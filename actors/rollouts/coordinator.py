"""The coordinator: owns the pools of generators and scorers, hands prompts out and returns scored batches.

It lives outside Ray Train, so a restart of the learner does not cost the generators. It holds nothing that is lost
for good: prompts are a function of (seed, step), and a learner that comes back publishes its weights again and says
which prompts it has had. If it dies, Ray starts another one, which whoever needs it next tells all of that
(`take_over`, see `coordinator_link`).

Who calls what, in the stage `rl`:

    jobs/rl.py       start_generators, start_scorers, set_prompts
    learner          begin ─▶ { next_version ─▶ load_weights ─▶ next_batch ─▶ train } for every step
                     answer, after some of the batches
    command          status, scale
    driver           announcements, all the time
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Sequence
from typing import Any

import ray

from actors.pools.announcing import Announcement, Announcements
from actors.pools.monitoring import Status, export_status
from actors.pools.remote import ActorDied, ActorFailure, Restarted, fetch
from actors.pools.worker import Worker
from actors.rollouts.ahead import Ahead
from actors.rollouts.batch import Batch, Counts
from actors.rollouts.coordinator_link import Setup
from actors.rollouts.groups import Cursor, Limits
from actors.rollouts.in_turn import InTurn, draw, generate, score
from actors.rollouts.rollout_pools import RolloutPools
from actors.rollouts.step_prompts import StepPrompts
from actors.rollouts.weight_sync import PublishedWeights
from rayrlhf.config import Config
from rayrlhf.data.prompts import EncodedPrompt
from rayrlhf.environments.base import EnvironmentMaker
from rayrlhf.rewards.gold import GoldMeasure
from rayrlhf.rewards.texts import TextRewards
from rayrlhf.runs.scaling import wanted_generators
from rayrlhf.trajectory import GenerationRequest, Sampling, Trajectory

log = logging.getLogger(__name__)


class Coordinator:
    """One per run. How batches are made is up to its rollout mode, `InTurn` or `Ahead`, which have the same methods."""

    def __init__(
        self,
        config: Config,
        model: str,
        max_model_len: int,
        pad_token_id: int,
        local: bool,
        environment: EnvironmentMaker | None = None,
    ) -> None:
        """
        Args:
            model: what generators start with, a directory or a hub name.
            max_model_len: tokens of prompt and response together.
            local: generators and scorers live in this process.
            environment: answers the policy, in a run whose responses take several turns.
        """
        self.config, self.local = config, local
        self.pools = RolloutPools(
            config, model, max_model_len, pad_token_id, self._bring_up_to_date, environment=environment, local=local
        )
        self.publication: PublishedWeights | None = None
        self.version = 0
        """Of the weights that were published last; 0 before the first."""
        self.prompts = StepPrompts([], config)
        self.sampling: Sampling | None = None
        self.rollouts: InTurn | Ahead = self._in_turn(Cursor(0))
        self.batch: Batch | None = None
        """The last batch, returned again when the same step and version are asked for."""
        self.reported = Counts()
        self._stopped = False
        self._generators_of_batch: list[str] = []
        """The generators at the last batch, by name."""
        self._announcements: Announcements | None = None
        """Where this is a process of its own; otherwise the user sees its warnings anyway."""
        self._knows_nothing = False
        """Whether this is the successor of one that died, before `take_over`."""
        if not local:
            self._knows_nothing = ray.get_runtime_context().was_current_actor_reconstructed
            self._announcements = Announcements()
            export_status(config.name, self.status)

    def __repr__(self) -> str:
        return "coordinator"

    # ---- the pools

    def start_generators(self) -> list[dict[str, Any]]:
        """Start the generators unless they run; returns who and where they are."""
        return self.pools.start_generators()

    def start_scorers(
        self,
        reward_model: str | None,
        reference: str,
        gold: GoldMeasure | None = None,
        texts: TextRewards | None = None,
    ) -> list[dict[str, Any]]:
        """Start scorers with these two models, in place of those with others; returns who and where they are.

        With `gold` they also have the labeller's measure of what they score, with `texts` rewards that read texts.
        """
        self._check_setup()
        return self.pools.start_scorers(reward_model, reference, gold, texts)

    def scale(self, generators: int | None = None, scorers: int | None = None) -> dict[str, int]:
        """Want so many from now on: newcomers join when they are up, leavers finish their work first. None: as it is.

        Returns what is wanted of each.

        Raises:
            UserError: less than one, or a pool that has not started.
        """
        return self.pools.scale(generators, scorers)

    def stats(self) -> list[dict[str, Any]]:
        """What each generator has done so far."""
        return self.pools.stats()

    def status(self) -> Status:
        """Where everything is at this moment. Other calls may be under way: this one waits for none of them."""
        rollouts, pools = self.rollouts, self.pools.started
        return Status(
            version=self.version,
            versions=rollouts.versions(),
            groups=rollouts.places(),
            actors={pool.role: len(pool) for pool in pools},
            wanted={pool.role: pool.wanted for pool in pools},
            replacements={pool.role: pool.deaths for pool in pools},
        )

    def announcements(self, process: str, heard: int) -> tuple[str, Sequence[Announcement]]:
        """What there is to tell the user: deaths, replacements, stragglers; see `Announcements.since`."""
        return self._announcements.since(process, heard) if self._announcements else ("", ())

    # ---- in the place of one that died

    def take_over(self, why: str, setup: Setup, cursor: Cursor, publication: PublishedWeights | None) -> None:
        """Learn what the coordinator before this one had been told. One that was merely out of reach knows it still.

        Args:
            why: what became of that one, for the user.
            cursor: which prompts the batches have taken.
            publication: the weights that the generators had; None if they had none.
        """
        if not self._knows_nothing:
            return
        log.warning("%s; another one takes its place", why)
        self._knows_nothing = False
        try:
            for method, args in setup.calls.items():
                getattr(self, method)(*map(fetch, args))
            self.version = setup.version
            self.begin(cursor)
            if publication is not None:
                self.next_version(publication.version - 1)
                self.load_weights(publication)
        except BaseException:
            self._knows_nothing = True  # not all of it
            raise

    def _check_setup(self) -> None:
        if self._knows_nothing:
            raise Restarted

    # ---- weights

    def next_version(self, after: int = 0) -> int:
        """A weight version that no generator has seen: versions rise strictly, also past `after`."""
        self._check_setup()
        self.version = max(self.version, after) + 1
        return self.version

    def load_weights(self, publication: PublishedWeights) -> int:
        """Load on every generator; running ahead, each one loads them before its next slice of work."""
        self._check_setup()
        self.rollouts.set_weights(publication)
        self.publication = publication
        return publication.version

    def _bring_up_to_date(self, generator: Worker) -> None:
        if self.publication is not None:
            generator.version = self.pools.generators.ask(generator, "load_weights", self.publication)

    # ---- work of the stages without batches

    def generate(self, requests: Sequence[GenerationRequest], sampling: Sampling, version: int) -> list[Trajectory]:
        """One trajectory per request, in order, by generators that all have weight `version`."""
        self._check_setup()
        self.rollouts.check_idle("coordinator.generate")
        return [serialized.load() for serialized in generate(self.pools.generators, requests, sampling, version)]

    def draw(self, requests: Sequence[GenerationRequest], sampling: Sampling, version: int) -> list[Trajectory | None]:
        """As `generate`, but after `stop_drawing` with None for each request that is not finished."""
        self._check_setup()
        self.rollouts.check_idle("coordinator.draw")
        done = draw(self.pools.generators, requests, sampling, version, lambda: self._stopped)
        return [done[place].load() if place in done else None for place in range(len(requests))]

    def stop_drawing(self) -> None:
        """Have `draw` return what it has. The run's command is about to end: it will draw nothing more."""
        self._stopped = True

    def score(self, trajectories: Sequence[Trajectory], temperature: float) -> list[Trajectory]:
        """The trajectories with rewards and reference log-probs, in order."""
        self._check_setup()
        self.rollouts.check_idle("coordinator.score")
        return score(self.pools.scorers, trajectories, temperature)

    # ---- batches

    def set_prompts(self, prompts: Sequence[EncodedPrompt], sampling: Sampling) -> None:
        """The prompts that `next_batch` draws from, and how their responses are sampled."""
        self._check_setup()
        self.prompts, self.sampling = StepPrompts(prompts, self.config), sampling
        self.begin(Cursor(0))

    def begin(self, cursor: Cursor) -> None:
        """A learner starts, anew or from a checkpoint that was written when `cursor` was left."""
        self._check_setup()
        self._go_on_from(cursor)
        self.batch = None
        self._reset_deaths()
        self.reported = self._counts()

    def next_batch(self, step: int, version: int) -> Batch:
        """The scored batch of `step` for a learner whose weights are `version`, which have been published.

        With `rl.max_staleness` 0 every token was sampled with these weights, by generators that wait for the learner
        otherwise; with k they go on meanwhile, and tokens are at most k versions old.
        Asking again for the same step and version (another rank, a retry) returns the same batch.
        """
        self._check_setup()
        if self.batch is not None and (self.batch.step, self.batch.version) == (step, version):
            return self.batch
        batch = self.rollouts.next_batch(step, version)
        if batch.cursor == Cursor(self.config.rl.steps):  # that was the last one: the actors are free for other work
            self._go_on_from(batch.cursor)
        now, before = self._counts(), self.reported
        generators = self.pools.generators
        batch.metrics.update(now.since(before) | {"rollout/generators": float(len(generators))})
        seconds = batch.metrics.get("time/generate", now.time - before.time)
        if self.config.rl.max_redraws:
            batch.metrics["rollout/redrawn"] = float(batch.redrawn)
        tokens = sum(t.written_tokens for t in batch.serialized)
        batch.metrics["throughput/generated_tokens_per_s"] = tokens / seconds
        self._follow_the_learner(batch.metrics)
        self.reported, self.batch = now, batch
        self._reset_deaths()
        return batch

    def answer(self, requests: Sequence[GenerationRequest], sampling: Sampling, version: int) -> list[Trajectory]:
        """Scored answers outside the batches, in order, drawn from the weights of `version`, those published last.

        What runs ahead of the learner makes way: no answer may mix versions. It begins again with the next batch, and
        what was under way is drawn anew.

        Raises:
            ActorFailure: other weights were published, an actor raised or was late, or too many died.
        """
        self._check_setup()
        publication = self.publication
        if publication is None or publication.version != version:
            raise ActorFailure(f"answer: load weights of version {version} before it")
        self._go_on_from(self.rollouts.cursor())
        generators = self.pools.generators
        for worker in [worker for worker in generators.workers if worker.version != version]:
            try:  # running ahead, a generator loads weights with its next work only
                self._bring_up_to_date(worker)
            except ActorDied as death:
                generators.lose(worker, death)
        answers = [serialized.load() for serialized in generate(generators, requests, sampling, version)]
        return score(self.pools.scorers, answers, sampling.temperature)

    def _go_on_from(self, cursor: Cursor) -> None:
        """End what is under way; the next batch begins anew, with the groups that the cursor leaves."""
        self.rollouts.stop()
        ahead = self.config.rl.max_staleness and cursor != Cursor(self.config.rl.steps)
        self.rollouts = self._ahead(cursor) if ahead else self._in_turn(cursor)

    def _in_turn(self, cursor: Cursor) -> InTurn:
        return InTurn(self.pools, self.prompts.groups, self.sampling, cursor=cursor, redraw=self.prompts.redraw)

    def _ahead(self, cursor: Cursor) -> Ahead:
        assert self.sampling is not None, "set_prompts comes before begin"
        config, resources = self.config.rl, self.config.resources
        return Ahead(
            self.pools.generators,
            self.pools.scorers,
            self.prompts.groups,
            self.sampling,
            Limits(
                steps=config.steps,
                groups_per_step=config.prompts_per_step,
                max_staleness=config.max_staleness,
                # As many wait inside the engine or on their way: no place there is empty until the next slice.
                generator_requests=resources.generators.max_num_seqs * 2,
                score_tokens=resources.scorers.micro_batch_tokens,
            ),
            cursor=cursor,
            background=not self.local,
            # An actor may answer nothing for as long as a call may take, before another one starts and does its work.
            timeout_s=resources.newcomer_timeout_s + 2 * resources.call_timeout_s,
            redraw=self.prompts.redraw,
        )

    def _counts(self) -> Counts:
        pools = self.pools.started
        busy = {name: seconds for pool in pools for name, seconds in pool.busy_s().items()}
        return Counts(time.monotonic(), sum(pool.deaths for pool in pools), busy)

    def _reset_deaths(self) -> None:
        for pool in self.pools.started:
            pool.reset_deaths()

    def _follow_the_learner(self, metrics: dict[str, float]) -> None:
        """Grow or shrink the generators by what the last step took, where the config says so."""
        limits, generators = self.config.resources.generators.scale, self.pools.generators
        if limits is None:
            return
        names = [worker.name for worker in generators.workers]
        before, self._generators_of_batch = self._generators_of_batch, names
        # If the generators were not the same during the whole step, its idle shares say nothing about these.
        if names and names == before and generators.steady:
            idle = statistics.fmean(metrics[f"idle/{name}"] for name in names)
            generators.scale(wanted_generators(len(names), metrics["rollout/learner_wait"], idle, limits))
