"""The two pools of a run, generators and scorers: started when they are first asked for, they serve all stages."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from actors.pools.pool import Pool
from actors.pools.remote import ActorFailure, Remote, put, wait
from actors.pools.worker import Worker
from actors.rollouts.spawning import spawn_generator, spawn_scorer
from rayrlhf.config import Config
from rayrlhf.environments.base import EnvironmentMaker
from rayrlhf.errors import UserError
from rayrlhf.rewards.gold import GoldMeasure
from rayrlhf.rewards.texts import TextRewards


class RolloutPools:
    """Generators and scorers of one run."""

    def __init__(
        self,
        config: Config,
        model: str,
        max_model_len: int,
        pad_token_id: int,
        on_new_generator: Callable[[Worker], None],
        *,
        environment: EnvironmentMaker | None,
        local: bool,
    ) -> None:
        """
        Args:
            model: what generators start with, a directory or a hub name.
            max_model_len: tokens of prompt and response together.
            on_new_generator: brings a generator up to date that starts during the run.
            environment: answers the policy, in a run whose responses take several turns.
            local: make the actors in this process.
        """
        self.config, self.model, self.max_model_len, self.pad_token_id = config, model, max_model_len, pad_token_id
        self.environment, self.local = environment, local
        self._on_new_generator = on_new_generator
        self._generators: Pool | None = None
        self._scorers: Pool | None = None
        self._scored_by: tuple[str | None, str] | None = None

    @property
    def generators(self) -> Pool:
        """The generators, started if need be. Once they have been up, a dead one is the pool's to replace."""
        if self._generators is None:
            self.start_generators()
        assert self._generators is not None
        return self._generators

    @property
    def scorers(self) -> Pool:
        """The scorers; raises ActorFailure before `start_scorers`, which knows their models."""
        if self._scorers is None:
            raise ActorFailure("scorers were asked for before start_scorers")
        return self._scorers

    @property
    def started(self) -> list[Pool]:
        """The pools that have been started, also one whose actors have all died."""
        return [pool for pool in (self._generators, self._scorers) if pool is not None]

    def started_workers(self, role: str) -> list[Worker]:
        """The workers of this role; none before the pool has started."""
        return [worker for pool in self.started if pool.role == role for worker in pool.workers]

    def start_generators(self) -> list[dict[str, Any]]:
        """Start the generators unless they run; returns what each one's `ready` says."""
        if self._generators is None:
            spawn = partial(
                spawn_generator,
                config=self.config,
                model=self.model,
                max_model_len=self.max_model_len,
                environment=self.environment,
                local=self.local,
            )
            count = self.config.resources.generators.count
            self._generators = self._pool("generator", count, spawn, self._on_new_generator)
        return self._generators.wait_until_ready()

    def start_scorers(
        self, reward_model: str | None, reference: str, gold: GoldMeasure | None, texts: TextRewards | None
    ) -> list[dict[str, Any]]:
        """Start scorers with these two models, in place of those with others; returns what each one's `ready` says.

        Args:
            reward_model: None if no reward needs one.
            gold: the labeller's measure of what they score.
            texts: rewards that read texts. Scorers that have these or `gold`, which know the prompts
                of a stage, are always started anew.
        """
        models = (reward_model, reference)
        if self._scorers is not None and self._scored_by == models and gold is None and texts is None:
            return self._scorers.broadcast("ready")
        if self._scorers is not None:
            self._scorers.stop()
        self._scored_by = models
        spawn = partial(
            spawn_scorer,
            config=self.config,
            reward_model=reward_model,
            reference=reference,
            pad_token_id=self.pad_token_id,
            gold=put(gold, self.local),
            texts=put(texts, self.local),
            local=self.local,
        )
        self._scorers = self._pool("scorer", self.config.resources.scorers.count, spawn)
        return self._scorers.wait_until_ready()

    def scale(self, generators: int | None, scorers: int | None) -> dict[str, int]:
        """Want so many workers from now on; None leaves a pool as it is. Returns how many each pool wants.

        Raises:
            UserError: a count below one, or a pool that has not started.
        """
        asked = ((self._generators, "generators", generators), (self._scorers, "scorers", scorers))
        for pool, role, count in asked:
            if count is not None and count < 1:
                raise UserError(f"scale: {count} {role}; at least one is needed")
            if count is not None and pool is None:
                raise UserError(f"scale: the run has not started its {role} yet; set resources.{role}.count")
        for pool, _, count in asked:
            if pool is not None and count is not None:
                pool.scale(count)
        return {pool.role: pool.wanted for pool in self.started}

    def stats(self) -> list[dict[str, Any]]:
        """What each generator has done so far."""
        calls = [worker.remote.submit("stats") for worker in self.started_workers("generator")]
        return wait(calls, self.config.resources.call_timeout_s)

    def _pool(
        self,
        role: str,
        count: int,
        spawn: Callable[[str], Remote],
        on_new: Callable[[Worker], None] = lambda worker: None,
    ) -> Pool:
        resources = self.config.resources
        return Pool(
            role,
            count,
            spawn,
            start_timeout_s=resources.start_timeout_s,
            call_timeout_s=resources.call_timeout_s,
            node_timeout_s=resources.wait_for_nodes_s,
            heartbeat_timeout_s=None if self.local else resources.heartbeat_timeout_s,
            on_new=on_new,
        )
