"""Our dispatcher beside RLlib's `FaultTolerantActorManager`: what a call costs, and what happens when an actor dies.

The calls only sleep, two at a time on each actor, as a generator's slices are kept in flight. The cost is the CPU time
of the caller's process, all of its threads, Ray's included. Several logical actors share a process. Both sides call
`empty(seconds)` of the same actors; the manager by way of their `apply`, which is all that it knows.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.harness import ENVIRONMENT, Child, alternate, column, main
from benchmarks.results import Comparison, Fact, Measurement, Result

ACTORS = (1, 10, 100)
PROCESSES = 4
SLEEP_S = 0.1
"""How long a call takes."""
IN_FLIGHT = 2
"""Calls that each actor has at a time; the manager's default as well."""
POLL_S = 0.05
"""How long either side waits for answers at a time: as the coordinator does when it runs ahead."""
TIMEOUT_S = 300


class Sleeper:
    """Some logical actors. `apply` is what the manager calls, `serialized_call` what our dispatcher does."""

    async def ready(self) -> int:
        return os.getpid()

    async def empty(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def apply(self, func: Callable[..., Any], **kwargs: Any) -> Any:
        return await func(self, **kwargs)

    async def serialized_call(self, message: bytes) -> bytes:
        from actors.pools.remote import dump, load

        method, args = load(message)
        return dump(await getattr(self, method)(*args))


class Cluster:
    """A private Ray cluster with the processes that the logical actors share."""

    def __init__(self) -> None:
        import ray

        os.environ.update(ENVIRONMENT)
        self.directory = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # short: it holds Unix sockets
        ray.init(
            address="local", num_cpus=2, include_dashboard=False, _temp_dir=self.directory, log_to_driver=False
        )  # fmt: skip
        self.sleepers = [self.spawn() for _ in range(PROCESSES)]
        ray.get([sleeper.ready.remote() for sleeper in self.sleepers], timeout=TIMEOUT_S)

    @staticmethod
    def spawn() -> Any:
        import ray

        return ray.remote(Sleeper).options(num_cpus=0, max_concurrency=1000).remote()

    def handles(self, count: int) -> list[Any]:
        return [self.sleepers[i % len(self.sleepers)] for i in range(count)]

    def close(self) -> None:
        import ray

        ray.shutdown()
        shutil.rmtree(self.directory, ignore_errors=True)


class Ours(Cluster):
    def run(self, turn: int) -> Measurement:
        return {f"{count}": self._cost(count) for count in ACTORS} | self._death()

    def _cost(self, count: int) -> float:
        """CPU time of a call, in us."""
        from actors.pools.dispatch import Dispatcher
        from actors.pools.remote import Remote

        handles = iter(self.handles(count))
        pool = self._pool(count, lambda name: Remote(name, next(handles), False))
        done, calls, cpu = 0, calls_for(count), time.process_time()
        with Dispatcher([pool], on_loss=lambda worker, held: None) as dispatcher:
            while done < calls:
                for worker in pool.workers:
                    while len(worker.calls) < IN_FLIGHT:
                        dispatcher.submit(worker, "empty", SLEEP_S, serialized=True)
                answers = dispatcher.poll(POLL_S)
                done += len(answers)
                dispatcher.deliver(answers)
        return 1e6 * (time.process_time() - cpu) / done

    def _death(self) -> Measurement:
        """Four pieces for two actors, one of which is killed: how many pieces are done, and how many actors there are
        afterwards."""
        import ray

        from actors.pools.dispatch import map_pieces
        from actors.pools.remote import Remote

        pool = self._pool(2, lambda name: Remote(name, self.spawn(), False))
        pool.wait_until_ready()
        ray.kill(pool.workers[0].remote._target)
        found = map_pieces(pool, "empty", [SLEEP_S] * 4)
        deadline = time.monotonic() + TIMEOUT_S
        while len(pool) < 2 and time.monotonic() < deadline:
            time.sleep(0.2)
            pool.apply_size()
        measured = {"pieces done": float(len(found)), "actors afterwards": float(len(pool))}
        pool.stop()
        return measured

    @staticmethod
    def _pool(count: int, spawn: Callable[[str], Any]) -> Any:
        from actors.pools.pool import Pool

        return Pool("sleeper", count, spawn, start_timeout_s=TIMEOUT_S, call_timeout_s=TIMEOUT_S)


class Theirs(Cluster):
    def run(self, turn: int) -> Measurement:
        return {f"{count}": self._cost(count) for count in ACTORS} | self._death()

    def _cost(self, count: int) -> float:
        """CPU time of a call, in us."""
        manager = self._manager(self.handles(count))
        done, calls, cpu = 0, calls_for(count), time.process_time()
        while done < calls:
            free = [
                actor
                for actor in manager.actor_ids()
                for _ in range(IN_FLIGHT - manager._remote_actor_states[actor].get_num_in_flight_requests())
            ]
            if free:
                manager.foreach_actor_async("empty", kwargs={"seconds": SLEEP_S}, remote_actor_ids=free)
            done += len(manager.fetch_ready_async_reqs(timeout_seconds=POLL_S))
        cost = 1e6 * (time.process_time() - cpu) / done
        manager.fetch_ready_async_reqs(timeout_seconds=10 * SLEEP_S)
        return cost

    def _death(self) -> Measurement:
        """The same four pieces, offered again and again to whoever is healthy, as its documentation has it."""
        import ray

        actors = [self.spawn() for _ in range(2)]
        ray.get([actor.ready.remote() for actor in actors], timeout=TIMEOUT_S)
        manager = self._manager(actors)
        ray.kill(actors[0])
        accepted = sum(
            manager.foreach_actor_async("empty", kwargs={"seconds": SLEEP_S}, remote_actor_ids=[actor])
            for actor in (0, 1, 0, 1)
        )
        found = list(manager.fetch_ready_async_reqs(timeout_seconds=10.0))
        dropped = 5 - sum(
            manager.foreach_actor_async("empty", kwargs={"seconds": SLEEP_S}, remote_actor_ids=[1]) for _ in range(5)
        )
        manager.probe_unhealthy_actors(timeout_seconds=10.0, mark_healthy=True)
        assert accepted == len(found) == 4
        measured = {
            "pieces done": float(sum(result.ok for result in found)),
            "actors afterwards": float(manager.num_healthy_actors()),
            "dropped of five calls for one actor": float(dropped),
        }
        ray.kill(actors[1])
        return measured

    @staticmethod
    def _manager(actors: list[Any]) -> Any:
        from ray.rllib.utils.actor_manager import FaultTolerantActorManager

        return FaultTolerantActorManager(actors, max_remote_requests_in_flight_per_actor=IN_FLIGHT)


def calls_for(actors: int) -> int:
    """Calls of a measurement: at least some rounds of all actors, and enough for the clock."""
    return max(200, 20 * actors)


def run(quick: bool) -> Result:
    found = alternate(
        {"ours": partial(Child, Ours, threads=1), "theirs": partial(Child, Theirs, threads=1)},
        range(1 if quick else 5),
    )
    ours, theirs = found["ours"], found["theirs"]
    return Result(
        {
            "a call": f"sleeps {1000 * SLEEP_S:.0f} ms; {IN_FLIGHT} in flight on each actor",
            "actors": f"logical, on {PROCESSES} processes; the caller polls every {1000 * POLL_S:.0f} ms",
            "a death": "one of two actors is killed, with four pieces of work for both",
        },
        comparisons=[
            Comparison(
                f"{count} actors: a call",
                "us",
                column(ours, f"{count}"),
                column(theirs, f"{count}"),
                "RLlib's manager",
                at_most=1.0,
            )
            for count in ACTORS
        ],
        facts=[
            Fact(f"{case} ({name})", "", column(rows, case))
            for name, rows in (("ours", ours), ("RLlib's manager", theirs))
            for case in ("pieces done", "actors afterwards", "dropped of five calls for one actor")
            if case in rows[0]
        ],
    )


if __name__ == "__main__":
    main("actor_manager")
