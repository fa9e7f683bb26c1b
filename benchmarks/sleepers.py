"""Actors that only wait: what the control plane costs is then all that there is. Light: no torch is imported."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from actors.pools.remote import SerializedCalls, dump, load
from rayrlhf.trajectory import GenerationRequest, Sampling, SerializedTrajectory, Trajectory

WAIT_MS = (2000, 10000)
"""How long a response takes: as its seed says."""


class Sleepers:
    """Many logical generators in one actor. A response is there after as many milliseconds as its seed says."""

    def __init__(self) -> None:
        self.version = 0
        self.locks: dict[int, asyncio.Lock] = defaultdict(asyncio.Lock)
        self.given: dict[int, int] = {}
        self.running: dict[int, dict[int, tuple[float, GenerationRequest]]] = defaultdict(dict)

    async def ready(self, logical: int = 0) -> bool:
        return True

    async def abort(self, logical: int) -> None:
        self.running.clear()

    async def serialized_call(self, message: bytes) -> bytes:
        """As of `SerializedCalls`; the first argument says which of the generators is meant."""
        method, args = load(message)
        return dump(await getattr(self, method)(*args))

    async def advance(
        self,
        logical: int,
        requests: Mapping[int, GenerationRequest],
        sampling: Sampling,
        seconds: float,
        version: int | None = None,
    ) -> dict[int, SerializedTrajectory]:
        async with self.locks[logical]:  # one slice at a time, as in a generator
            self.version = version or self.version
            now, running = time.monotonic(), self.running[logical]
            running |= {ticket: (now + _seconds(request), request) for ticket, request in requests.items()}
            if requests:
                self.given[logical] = len(running)
            if running:
                enough = min(len(running), -(-self.given[logical] // 3))
                then = sorted(at for at, _ in running.values())[enough - 1]
                await asyncio.sleep(min(seconds, max(0.2, then - now)))
            now = time.monotonic()
            done = {ticket: request for ticket, (at, request) in running.items() if at <= now}
            for ticket in done:
                del running[ticket]
            return {ticket: self._serialized(request, sampling) for ticket, request in done.items()}

    def _serialized(self, request: GenerationRequest, sampling: Sampling) -> SerializedTrajectory:
        tokens = sampling.max_tokens
        return SerializedTrajectory.of(
            Trajectory(
                prompt_id=request.prompt_id,
                sample_index=request.sample_index,
                seed=request.seed,
                prompt_ids=np.asarray(request.prompt_ids, np.int64),
                response_ids=np.zeros(tokens, np.int64),
                generator_logprobs=np.zeros(tokens, np.float32),
                versions=np.full(tokens, self.version, np.int64),
                finish_reason="length",
            )
        )


def _seconds(request: GenerationRequest) -> float:
    first, last = WAIT_MS
    return (first + request.seed % (last - first)) / 1000


class Marker(SerializedCalls):
    """A scorer that gives every response the same."""

    def ready(self) -> bool:
        return True

    def score_serialized(
        self, trajectories: Sequence[SerializedTrajectory], temperature: float
    ) -> list[SerializedTrajectory]:
        return [SerializedTrajectory.of(self._scored(serialized.load())) for serialized in trajectories]

    def _scored(self, trajectory: Trajectory) -> Trajectory:
        trajectory.rewards = {"constant": 1.0}
        trajectory.ref_logprobs = trajectory.generator_logprobs
        return trajectory
