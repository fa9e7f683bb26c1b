"""Calls under way and their answers, with answers given by hand."""

from __future__ import annotations

import time
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from actors.pools.dispatch import Dispatcher
from actors.pools.pool import Pool
from actors.pools.remote import ActorFailure, Call, Remote
from actors.pools.worker import Worker


class Pending(Call):
    """A call that the test answers; its `ref` is the future."""

    def future(self) -> Future[Any]:
        assert isinstance(self.ref, Future)
        return self.ref


class ByHand(Remote):
    """Its calls are in `asked` and their arguments in `given`, by name."""

    def __init__(self, name: str) -> None:
        super().__init__(name, None, False)
        self.asked: dict[str, Future[Any]] = {}
        self.given: dict[str, tuple[Any, ...]] = {}

    def submit(self, method: str, *args: Any, **kwargs: Any) -> Call:
        self.asked[method], self.given[method] = Future(), args
        return Pending(self.name, method, self.asked[method], False, time.monotonic())

    def kill(self) -> None:
        pass


@dataclass
class Clock:
    now: float = 0.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)
    return clock


@pytest.fixture
def pool() -> Pool:
    return Pool("worker", 2, ByHand, start_timeout_s=5, call_timeout_s=5)


class Log:
    """The workers of one pool, what they answered in order, and the work of those that died."""

    def __init__(self, pool: Pool) -> None:
        self.heard: list[str] = []
        self.lost: list[dict[int, Any]] = []
        self.dispatcher = Dispatcher([pool], lambda worker, held: self.lost.append(held))

    def submit(self, worker: Worker, method: str) -> Future[Any]:
        self.dispatcher.submit(worker, method, then=self.heard.append)
        assert isinstance(worker.remote, ByHand)
        return worker.remote.asked[method]

    def settle(self) -> list[Worker]:
        return self.dispatcher.deliver(self.dispatcher.poll(0.0))


def test_answers_are_delivered_in_the_order_of_the_calls(pool: Pool) -> None:
    log = Log(pool)
    first, second = log.submit(pool.workers[0], "first"), log.submit(pool.workers[0], "second")
    other = log.submit(pool.workers[1], "other")
    second.set_result("second")
    other.set_result("other")
    assert log.settle() == [pool.workers[0], pool.workers[1]]
    assert log.heard == ["other"] and len(pool.workers[0].calls) == 2
    first.set_result("first")
    assert log.settle() == [pool.workers[0]]
    assert log.heard == ["other", "first", "second"] and not pool.workers[0].calls
    assert log.settle() == []


def test_a_worker_is_busy_from_its_call_or_its_last_answer_to_the_next(pool: Pool, clock: Clock) -> None:
    log = Log(pool)
    for at, call in [(3.0, log.submit(pool.workers[0], "first")), (7.0, log.submit(pool.workers[0], "second"))]:
        clock.now = at
        call.set_result("")
        log.settle()
    clock.now = 8.0
    last = log.submit(pool.workers[0], "third")
    clock.now = 10.0
    last.set_result("")
    log.settle()
    assert pool.busy_s() == {"worker-0": 9.0, "worker-1": 0.0}


def test_a_death_gives_the_work_back_and_later_answers_of_the_dead_do_not_count(pool: Pool) -> None:
    log = Log(pool)
    worker, other = pool.workers
    worker.held[7] = "work"
    first, second, third = (log.submit(worker, name) for name in ("first", "second", "third"))
    second.set_exception(ActorDiedError())  # its answer to the first call is still on its way
    assert log.settle() == []
    assert log.lost == [{7: "work"}] and not worker.held
    first.set_result("first")
    third.set_exception(ActorDiedError())
    assert log.settle() == [] and log.heard == []
    assert pool.deaths == 1
    # The other one is the first now, and one more is on its way.
    assert pool.workers == [other]
    assert [worker.name for worker in pool.workers] == ["worker-1"]
    assert [newcomer.actor.name for newcomer in pool.joining] == ["worker-2"]


def test_what_is_under_way_when_a_job_ends_does_not_reach_the_next_one(pool: Pool) -> None:
    first, worker = Log(pool), pool.workers[0]
    with first.dispatcher:
        late = first.submit(worker, "first")
        worker.held[7] = "work"
    assert worker.idle
    second = Log(pool)
    answer = second.submit(worker, "second")
    late.set_result("first")
    answer.set_result("second")
    assert first.settle() == [] and second.settle() == [worker]
    assert (first.heard, second.heard) == ([], ["second"])


def test_a_worker_that_answers_nothing_is_replaced_and_a_second_one_is_an_error_that_names_it(
    pool: Pool, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    log = Log(pool)
    worker, silent = pool.workers
    fast, slow = log.submit(silent, "fast"), log.submit(silent, "slow")
    silent.held[7] = "work"
    clock.now = 3.0
    fast.set_result("fast")
    log.settle()
    clock.now = 7.9
    log.settle()  # "slow" was asked 7.9 s ago, but its turn came 4.9 s ago
    assert pool.workers == [worker, silent]
    clock.now = 9.1
    log.settle()
    assert pool.workers == [worker] and pool.deaths == 1 and log.lost == [{7: "work"}]
    assert [newcomer.actor.name for newcomer in pool.joining] == ["worker-2"]
    (said,) = (record.message for record in caplog.records)
    assert said.startswith("worker-1.slow did not answer within 5 s")
    assert said.endswith(
        "it is killed as if it had died; 1 workers go on (wanted: 2), on their way: worker-2; 3 of 4 replacements left"
    )
    slow.set_result("slow")
    assert log.settle() == [] and log.heard == ["fast"]

    log.submit(worker, "other")
    clock.now = 20.0
    with pytest.raises(ActorFailure, match=r"worker-0\.other did not answer within 5 s"):
        log.settle()
    pool.reset_deaths()  # a new round
    clock.now = 22.0
    log.settle()
    assert pool.workers == [] and pool.deaths == 2


def test_waiting_ends_with_the_first_answer_or_in_time(pool: Pool) -> None:
    log = Log(pool)
    started = time.monotonic()
    assert log.dispatcher.poll(0.05) == []
    assert time.monotonic() - started > 0.04
    log.submit(pool.workers[0], "first").set_result("first")
    assert len(log.dispatcher.poll(600.0)) == 1
    assert time.monotonic() - started < 600.0
