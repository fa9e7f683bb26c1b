"""The generator actor: a vLLM engine that knows which version of the policy it holds."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

from actors.pools.remote import SerializedCalls, this_node
from actors.rollouts.engine import Engine
from actors.rollouts.weight_sync import PublishedWeights, WeightSyncError
from rayrlhf.config import GeneratorConfig, ModelConfig
from rayrlhf.trajectory import GenerationRequest, Sampling, SerializedTrajectory, Trajectory

INITIAL_VERSION = -1
"""A new or restarted generator holds the initial weights, and refuses to generate until it is synced."""

SLICE_S = 0.2
"""The shortest time that `advance` works before it hands over what is finished, unless nothing is left to do."""


class Generator(SerializedCalls):
    """Draws responses from the policy. A plain class: `Remote.spawn` makes a Ray actor of it, or keeps it local."""

    def __init__(self, name: str, model: ModelConfig, settings: GeneratorConfig, max_model_len: int, seed: int) -> None:
        """`model.path` is a directory or a hub name; `max_model_len` bounds prompt + response, in tokens."""
        self._name = name
        self.engine = Engine(
            model.path,
            revision=model.revision,
            dtype=model.dtype,
            max_model_len=max_model_len,
            settings=settings,
            seed=seed,
        )
        self._version = INITIAL_VERSION
        self._tokens = 0
        self._given = 0
        """Requests in flight when some were added last."""

    def __repr__(self) -> str:
        return self._name

    def ready(self) -> dict[str, Any]:
        """Warm up with one tiny request unless at work, then say who and where this is: `pid`, `node`, `version`."""
        if not self.engine.in_flight:
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
        """Take in `requests` by ticket, work for about `seconds`, return what is finished of these and earlier ones.

        Returns early when nothing is left to do, or when there is room for more: as many are finished as a third of
        what was in flight when some were added last. Weights are loaded first: responses in flight go on under them.

        Raises:
            WeightSyncError: it has only its initial weights, or a weight load failed half-way.
            UserError: an impossible request, see `Engine.add`.
        """
        if publication:
            self.load_weights(publication)
        if self._version == INITIAL_VERSION:
            raise WeightSyncError(f"{self._name} has only its initial weights: sync it first")
        self.engine.add(requests, sampling, self._version)
        if requests:
            self._given = self.engine.in_flight
        done: dict[int, Trajectory] = {}
        started = time.monotonic()
        while self.engine.in_flight and (elapsed := time.monotonic() - started) < seconds:
            if elapsed > SLICE_S and 3 * len(done) >= self._given:
                break
            done |= self.engine.step()
        self._tokens += sum(len(trajectory.response_ids) for trajectory in done.values())
        return {ticket: SerializedTrajectory.of(trajectory) for ticket, trajectory in done.items()}

    def abort(self) -> None:
        """Drop what is in flight."""
        self.engine.abort()

    def load_weights(self, publication: PublishedWeights) -> int:
        """Replace the policy; returns the new version. Responses in flight go on under it.

        Raises:
            WeightSyncError: the version does not rise, or the weights are corrupt or not of this model.
        """
        if publication.version <= self._version:
            raise WeightSyncError(f"{self._name} has version {self._version}, refuses {publication.version}")
        self.engine.load_weights(publication.tensors(), publication.version)
        self._version = publication.version
        return self._version

    def stats(self) -> dict[str, Any]:
        """`tokens` generated since the start; `version` held."""
        return {"tokens": self._tokens, "version": self._version}
