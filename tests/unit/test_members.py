"""Calls under way and their answers, with answers given by hand."""

from __future__ import annotations

import time
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from actors.pools.members import Member, Members
from actors.pools.pool import Pool
from actors.pools.remote import ActorDied, ActorFailure, Call, Remote


class Pending(Call):
    """A call that the test answers; its `ref` is the future."""

    def future(self) -> Future[Any]:
        assert isinstance(self.ref, Future)
        return self.ref


class ByHand(Remote):
    """Its calls are in `asked`, by name."""

    def __init__(self, name: str) -> None:
        super().__init__(name, None, False)
        self.asked: dict[str, Future[Any]] = {}

    def submit(self, method: str, *args: Any, **kwargs: Any) -> Call:
        self.asked[method] = Future()
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
    """Members of one pool, what they answered in order, and which of them died."""

    def __init__(self, pool: Pool) -> None:
        self.heard: list[str] = []
        self.lost: list[dict[int, Any]] = []
        self.members = Members([pool], self.died)
        self.of = self.members.of[pool]

    def died(self, member: Member, death: ActorDied) -> None:
        self.lost.append(self.members.lose(member, death))

    def ask(self, member: Member, method: str) -> Future[Any]:
        self.members.ask(member, method, then=self.heard.append)
        assert isinstance(member.remote, ByHand)
        return member.remote.asked[method]

    def settle(self) -> list[Member]:
        return list(self.members.hand_on(self.members.answers(0.0)))


def test_answers_are_handed_on_in_the_order_of_the_calls(pool: Pool) -> None:
    log = Log(pool)
    first, second = log.ask(log.of[0], "first"), log.ask(log.of[0], "second")
    other = log.ask(log.of[1], "other")
    second.set_result("second")
    other.set_result("other")
    assert log.settle() == [log.of[0], log.of[1]]
    assert log.heard == ["other"] and len(log.of[0].calls) == 2
    first.set_result("first")
    assert log.settle() == [log.of[0]]
    assert log.heard == ["other", "first", "second"] and not log.of[0].calls
    assert log.settle() == []


def test_a_member_is_busy_from_its_call_or_its_last_answer_to_the_next(pool: Pool, clock: Clock) -> None:
    log = Log(pool)
    for at, call in [(3.0, log.ask(log.of[0], "first")), (7.0, log.ask(log.of[0], "second"))]:
        clock.now = at
        call.set_result("")
        log.settle()
    clock.now = 8.0
    last = log.ask(log.of[0], "third")
    clock.now = 10.0
    last.set_result("")
    log.settle()
    assert pool.busy_s() == {"worker-0": 9.0, "worker-1": 0.0}


def test_a_death_gives_the_work_back_and_later_answers_of_the_dead_do_not_count(pool: Pool) -> None:
    log = Log(pool)
    member, other = log.of
    member.held[7] = "work"
    first, second, third = (log.ask(member, name) for name in ("first", "second", "third"))
    second.set_exception(ActorDiedError())  # its answer to the first call is still on its way
    assert log.settle() == []
    assert log.lost == [{7: "work"}] and not member.held
    first.set_result("first")
    third.set_exception(ActorDiedError())
    assert log.settle() == [] and log.heard == []
    assert pool.deaths == 1
    # The other one has moved up, and one more is on its way.
    assert log.of == [other] and other.index == 0
    assert [actor.name for actor in pool.actors] == ["worker-1"]
    assert [newcomer.actor.name for newcomer in pool.joining] == ["worker-2"]


def test_a_call_that_takes_too_long_is_an_error_that_names_it(pool: Pool, clock: Clock) -> None:
    log = Log(pool)
    fast, _ = log.ask(log.of[1], "fast"), log.ask(log.of[1], "slow")
    clock.now = 3.0
    fast.set_result("fast")
    log.settle()
    clock.now = 7.9
    log.settle()  # "slow" was asked 7.9 s ago, but its turn came 4.9 s ago
    clock.now = 9.1
    with pytest.raises(ActorFailure, match=r"worker-1\.slow did not answer within 5 s"):
        log.settle()


def test_waiting_ends_with_the_first_answer_or_in_time(pool: Pool) -> None:
    log = Log(pool)
    started = time.monotonic()
    assert log.members.answers(0.05) == []
    assert 0.04 < time.monotonic() - started < 1.0
    log.ask(log.of[0], "first").set_result("first")
    assert len(log.members.answers(60.0)) == 1
    assert time.monotonic() - started < 2.0
