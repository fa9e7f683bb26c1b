"""The generator actor: a vLLM engine that knows which version of the policy it holds."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

from actors.pools.remote import SerializedCalls, this_node
from actors.rollouts.engine import Engine
from actors.rollouts.episodes import Episodes, Rollout
from actors.rollouts.weight_sync import PublishedWeights, WeightSyncError
from rayrlhf.config import ModelConfig
from rayrlhf.config_resources import GeneratorConfig
from rayrlhf.environments.base import EnvironmentMaker
from rayrlhf.runs.storage import local_copy
from rayrlhf.trajectory import GenerationRequest, Sampling, SerializedTrajectory, Trajectory

INITIAL_VERSION = -1
"""The version of a new generator: it holds the model that it started with, and refuses to generate."""

SLICE_S = 0.2
"""`advance` works at least this long before it returns early, unless nothing is left to do."""


class Generator(SerializedCalls):
    """Draws responses from the policy. A plain class: `Remote.spawn` makes a Ray actor of it, or keeps it local."""

    def __init__(
        self,
        name: str,
        model: ModelConfig,
        settings: GeneratorConfig,
        max_model_len: int,
        seed: int,
        environment: EnvironmentMaker | None = None,
    ) -> None:
        """
        Args:
            model: its `path` is a directory, a URI or a hub name.
            max_model_len: bounds prompt + response, in tokens.
            environment: answers the policy, in a run whose responses take several turns.
        """
        self._name = name
        path = local_copy(model.path)
        self.engine = Engine(
            path,
            revision=model.revision,
            dtype=model.dtype,
            max_model_len=max_model_len,
            settings=settings,
            seed=seed,
        )
        self.rollout: Rollout = self.engine
        if environment:
            # Here, because the coordinator imports this file for the class alone: transformers takes seconds.
            from rayrlhf.models.loading import load_tokenizer

            self.rollout = Episodes(self.engine, environment, load_tokenizer(path, model.revision))
        self._version = INITIAL_VERSION
        self._tokens = 0
        self._given = 0
        """How many requests were in flight when some were added last."""

    def __repr__(self) -> str:
        return self._name

    def ready(self) -> dict[str, Any]:
        """Warm up with one tiny request unless at work; returns `pid`, `node` and `version`."""
        if not self.rollout.in_flight:
            warm_up = GenerationRequest(prompt_id="warm-up", prompt_ids=(0,))
            self.engine.generate([warm_up], Sampling(temperature=1.0, max_tokens=2, eos_token_id=0), self._version)
        return {"pid": os.getpid(), "node": this_node(), "version": self._version}

    def advance(
        self,
        requests: Mapping[int, GenerationRequest],
        sampling: Sampling,
        seconds: float,
        publication: PublishedWeights | None = None,
    ) -> dict[int, SerializedTrajectory]:
        """Take in `requests` and work for a slice: about `seconds`, on these and on earlier requests.

        The slice ends early when nothing is left to do, or when there is room for more: as many responses are finished
        as a third of all that were in flight when requests were added last.

        Args:
            requests: by ticket, a number that no request in flight has.
            publication: weights to load first; responses in flight go on under them.

        Returns:
            The responses that were finished in this slice, by ticket.

        Raises:
            WeightSyncError: the generator has only its initial weights, or a weight load failed half-way.
            UserError: an impossible request, see `Engine.add`.
        """
        if publication:
            self.load_weights(publication)
        if self._version == INITIAL_VERSION:
            raise WeightSyncError(f"{self._name} has only its initial weights: sync it first")
        self.rollout.add(requests, sampling, self._version)
        if requests:
            self._given = self.rollout.in_flight
        done: dict[int, Trajectory] = {}
        started = time.monotonic()
        while self.rollout.in_flight and (elapsed := time.monotonic() - started) < seconds:
            if elapsed > SLICE_S and 3 * len(done) >= self._given:
                break
            done |= self.rollout.step()
        self._tokens += sum(trajectory.written_tokens for trajectory in done.values())
        return {ticket: SerializedTrajectory.of(trajectory) for ticket, trajectory in done.items()}

    def abort(self) -> None:
        """Drop all requests in flight."""
        self.rollout.abort()

    def load_weights(self, publication: PublishedWeights) -> int:
        """Replace the policy; returns the new version. Responses in flight go on under it.

        Raises:
            WeightSyncError: the version does not rise, or the weights are corrupt or not of this model.
        """
        if publication.version <= self._version:
            raise WeightSyncError(f"{self._name} has version {self._version}, refuses {publication.version}")
        self.rollout.load_weights(publication.tensors(), publication.version)
        self._version = publication.version
        return self._version

    def stats(self) -> dict[str, Any]:
        """`tokens`: generated since the start, in finished responses; `version`: of the weights."""
        return {"tokens": self._tokens, "version": self._version}
