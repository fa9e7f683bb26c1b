"""What the coordinator costs: up to 1,000 logical generators that only sleep, on 16 actors, and 100,000 trajectories.

Real are dispatch, queues, staleness rules, batches, the object store and the messages; generators, scorer and learner
do nothing. The cost is the CPU time of the coordinator's process, all of its threads, Ray's included.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from functools import partial
from typing import Any

import numpy as np

from benchmarks.harness import ENVIRONMENT, Child, Fact, Measurement, Result, alternate, column, main
from benchmarks.sleepers import Marker, Sleepers

ACTORS = 16
PROMPT, RESPONSE = 128, 48
REQUESTS = 48
"""In flight in each logical generator."""
WAIT_MS = (2000, 10000)
TIMEOUT_S = 600


class ControlPlane:
    """A private Ray cluster with the actors; this process is the coordinator."""

    def __init__(self, logical: int, per_step: int, steps: int) -> None:
        import ray

        os.environ.update(ENVIRONMENT)
        self.logical, self.per_step, self.steps = logical, per_step, steps
        self.directory = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # short: it holds Unix sockets
        ray.init(
            address="local", num_cpus=2, include_dashboard=False, _temp_dir=self.directory, log_to_driver=False,
            object_store_memory=2**30,
        )  # fmt: skip
        sleepers = ray.remote(Sleepers).options(num_cpus=0, max_concurrency=1000)
        self.actors = [sleepers.remote() for _ in range(min(ACTORS, logical))]
        self.marker = ray.remote(Marker).options(num_cpus=0).remote()
        ray.get([actor.ready.remote() for actor in [*self.actors, self.marker]], timeout=TIMEOUT_S)

    def run(self, turn: int) -> Measurement:
        import ray

        from actors.pool import Pool
        from actors.remote import Call, Remote
        from actors.rollouts import Cursor, Limits, Rollouts
        from actors.weight_sync import Publication
        from rayrlhf.trajectory import GenerationRequest, Sampling

        class Logical(Remote):
            """One of the generators of an actor."""

            number: int

            def submit(self, method: str, *args: Any, **kwargs: Any) -> Call:
                sent = [arg.version if isinstance(arg, Publication) else arg for arg in args]
                started = time.monotonic()
                ref = getattr(self._target, method).remote(self.number, *sent)
                return Call(self.name, method, ref, False, started)

        def spawn(name: str) -> Remote:
            generator = Logical(name, self.actors[int(name.split("-")[1]) % len(self.actors)], False)
            generator.number = int(name.split("-")[1])
            return generator

        def groups(step: int) -> list[list[GenerationRequest]]:
            rng = np.random.default_rng([turn, step])
            waits = rng.integers(*WAIT_MS, self.per_step)
            return [[GenerationRequest(f"{step}-{i}", prompt, 0, int(wait))] for i, wait in enumerate(waits)]

        prompt = tuple(range(PROMPT))
        bounds: dict[str, Any] = {"start_timeout_s": TIMEOUT_S, "call_timeout_s": TIMEOUT_S}
        generators = Pool("generator", self.logical, spawn, **bounds)
        scorers = Pool("scorer", 1, lambda name: Remote(name, self.marker, False), **bounds)
        limits = Limits(self.steps, self.per_step, 1, generator_requests=REQUESTS, score_tokens=100_000)
        started, cpu = time.perf_counter(), time.process_time()
        rollouts = Rollouts(
            generators, scorers, groups, Sampling(1.0, RESPONSE, 0), limits, step=0, cursor=Cursor(0),
            publication=Publication(0, (), (), ""), background=True,
        )  # fmt: skip
        trained = 0
        for step in range(self.steps):
            batch = [t for group in rollouts.take(step, step, TIMEOUT_S) for t in group.trajectories]
            ray.put(batch)  # as the answer to the learner
            trained += len(batch)
            rollouts.publish(Publication(step + 1, (), (), ""))
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
        rollouts.stop()
        assert trained == self.steps * self.per_step
        return {"us a trajectory": 1e6 * cpu / trained, "trajectories/s": trained / seconds}

    def close(self) -> None:
        import ray

        ray.shutdown()
        shutil.rmtree(self.directory, ignore_errors=True)


def run(quick: bool) -> Result:
    sizes = ((10, 100, 3),) if quick else ((1000, 25_000, 4), (1000, 25_000, 1), (250, 6250, 4), (64, 1600, 10))
    result = Result(
        {
            "a trajectory": f"{PROMPT} + {RESPONSE} tokens; generated after {WAIT_MS[0]} to {WAIT_MS[1]} ms",
            "target": "at most 100 us of the coordinator's CPU time a trajectory, whatever the number of either",
        }
    )
    for logical, per_step, steps in sizes:
        name = f"{logical:,} generators, {per_step * steps:,} trajectories"
        found = alternate({name: partial(Child, ControlPlane, logical, per_step, steps, threads=1)}, range(1))[name]
        result.facts.append(Fact(f"{name}: cost", "us a trajectory", column(found, "us a trajectory")))
        result.facts.append(Fact(f"{name}: throughput", "trajectories/s", column(found, "trajectories/s")))
    return result


if __name__ == "__main__":
    main("control_plane")
