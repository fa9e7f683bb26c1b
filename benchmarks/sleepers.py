"""Actors that only wait: what the control plane costs is then all that there is. Light: no torch is imported."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rayrlhf.trajectory import GenerationRequest, Sampling, Trajectory


class Sleepers:
    """Many logical generators in one actor. A response is there after as many milliseconds as its seed says."""

    def __init__(self) -> None:
        self.version = 0
        self.locks: dict[int, asyncio.Lock] = defaultdict(asyncio.Lock)
        self.running: dict[int, dict[int, tuple[float, GenerationRequest]]] = defaultdict(dict)

    async def ready(self) -> bool:
        return True

    async def load_weights(self, logical: int, version: int) -> int:
        self.version = version
        return version

    async def abort(self, logical: int) -> None:
        self.running.clear()

    async def advance(
        self, logical: int, requests: Mapping[int, GenerationRequest], sampling: Sampling, seconds: float
    ) -> dict[int, Trajectory]:
        async with self.locks[logical]:  # one slice at a time, as in a generator
            now, running = time.monotonic(), self.running[logical]
            running |= {ticket: (now + request.seed / 1000, request) for ticket, request in requests.items()}
            if running:
                quarter = sorted(at for at, _ in running.values())[(len(running) - 1) // 4]
                await asyncio.sleep(min(seconds, max(0.2, quarter - now)))
            now = time.monotonic()
            done = {ticket: request for ticket, (at, request) in running.items() if at <= now}
            for ticket in done:
                del running[ticket]
            return {ticket: self._trajectory(request, sampling) for ticket, request in done.items()}

    def _trajectory(self, request: GenerationRequest, sampling: Sampling) -> Trajectory:
        tokens = sampling.max_tokens
        return Trajectory(
            prompt_id=request.prompt_id,
            sample_index=request.sample_index,
            seed=request.seed,
            prompt_ids=np.asarray(request.prompt_ids, np.int64),
            response_ids=np.zeros(tokens, np.int64),
            generator_logprobs=np.zeros(tokens, np.float32),
            versions=np.full(tokens, self.version, np.int64),
            finish_reason="length",
        )


class Marker:
    """A scorer that gives every response the same."""

    def ready(self) -> bool:
        return True

    def score(self, trajectories: Sequence[Trajectory], temperature: float) -> list[Any]:
        for trajectory in trajectories:
            trajectory.rewards = {"constant": 1.0}
            trajectory.ref_logprobs = trajectory.generator_logprobs
        return list(trajectories)
