"""What the coordinator costs: up to 1,000 logical generators that only sleep, on 16 actors, and 100,000 trajectories.

Real are dispatch, queues, staleness rules, batches, the object store and the messages; generators, scorer and learner
do nothing. The cost is the CPU time of the coordinator's process, all of its threads, Ray's included. For comparison:
what calls of an empty method cost it, sent in one go.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.harness import ENVIRONMENT, Child, alternate, column, main
from benchmarks.results import Fact, Measurement, Result
from benchmarks.sleepers import WAIT_MS, Marker, Sleepers

if TYPE_CHECKING:
    from actors.pools.pool import Pool

ACTORS = 16
PROMPT, RESPONSE = 128, 48
REQUESTS = 64
"""In flight in each logical generator."""
TIMEOUT_S = 600
EMPTY_CALLS = 5_000


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

        from actors.pools.pool import Pool
        from actors.pools.remote import Call, Remote, dump
        from actors.rollouts.ahead import Ahead
        from actors.rollouts.groups import Cursor, Limits
        from actors.rollouts.weight_sync import Publication
        from rayrlhf.data.prompts import EncodedPrompt, prompts_of_step, requests_for
        from rayrlhf.trajectory import GenerationRequest, Sampling

        class Logical(Remote):
            """One of the generators of an actor."""

            number: int
            calls = 0
            """Of all together."""

            def submit(self, method: str, *args: Any, **kwargs: Any) -> Call:
                Logical.calls += 1
                sent = [arg.version if isinstance(arg, Publication) else arg for arg in args]
                started = time.monotonic()
                ref = getattr(self._target, method).remote(self.number, *sent)
                return Call(self.name, method, ref, False, started)

            def submit_serialized(self, method: str, *args: Any) -> Call:
                Logical.calls += 1
                started = time.monotonic()
                ref = self._target.serialized_call.remote(dump((method, (self.number, *args))))
                return Call(self.name, method, ref, False, started, serialized=True)

        def spawn(name: str) -> Remote:
            generator = Logical(name, self.actors[int(name.split("-")[1]) % len(self.actors)], False)
            generator.number = int(name.split("-")[1])
            return generator

        def groups(step: int) -> list[list[GenerationRequest]]:
            chosen = prompts_of_step(len(prompts), turn, step, self.per_step)
            return [[r] for r in requests_for([prompts[i] for i in chosen], 1, turn, "rl", step)]

        prompts = [
            EncodedPrompt(str(i), tuple(ids))
            for i, ids in enumerate(np.random.default_rng(turn).integers(0, 32_000, (10_000, PROMPT)).tolist())
        ]
        bounds: dict[str, Any] = {"start_timeout_s": TIMEOUT_S, "call_timeout_s": TIMEOUT_S}
        generators = Pool("generator", self.logical, spawn, **bounds)
        scorers = Pool("scorer", 1, lambda name: Remote(name, self.marker, False), **bounds)
        limits = Limits(self.steps, self.per_step, 1, generator_requests=REQUESTS, score_tokens=100_000)
        started, cpu = time.perf_counter(), time.process_time()
        ahead = Ahead(
            generators, scorers, groups, Sampling(1.0, RESPONSE, 0), limits, cursor=Cursor(0), background=True,
            timeout_s=TIMEOUT_S,
        )  # fmt: skip
        trained = 0
        for step in range(self.steps):
            ahead.set_weights(Publication(step, (), (), ""))
            batch = ahead.next_batch(step, step)
            ray.put(batch)  # as the answer to the learner
            trained += len(batch.serialized)
        seconds, cpu, calls = time.perf_counter() - started, time.process_time() - cpu, Logical.calls
        ahead.stop()
        assert trained == self.steps * self.per_step
        return {
            "us a trajectory": 1e6 * cpu / trained,
            "trajectories/s": trained / seconds,
            "trajectories a call": trained / calls,
            "us an empty call": 1e6 * self._empty_calls(generators),
        }

    @staticmethod
    def _empty_calls(generators: Pool) -> float:
        """Seconds of CPU time for one of many."""
        from actors.pools.dispatch import Dispatcher

        cpu, rounds = time.process_time(), EMPTY_CALLS // len(generators)
        with Dispatcher([generators], on_loss=lambda worker, held: None) as dispatcher:
            for _ in range(rounds):
                for worker in generators.workers:
                    dispatcher.submit(worker, "ready", serialized=True)
            while dispatcher.busy:
                dispatcher.deliver(dispatcher.poll(1.0))
        return (time.process_time() - cpu) / (rounds * len(generators))

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
        brought = "responses that a generator's call brings"
        result.facts.append(Fact(f"{name}: {brought}", "", column(found, "trajectories a call")))
        result.facts.append(Fact(f"{name}: an empty call", "us", column(found, "us an empty call")))
    return result


if __name__ == "__main__":
    main("control_plane")
