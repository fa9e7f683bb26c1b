"""The pool and `Remote` on a real cluster, with actors that only add: what they promise holds for any actor."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from actors.members import Member, Members
from actors.pool import Pool
from actors.remote import ActorDied, ActorFailure, PackedCalls, Remote, answer, finished, wait
from rayrlhf.errors import UserError

pytestmark = pytest.mark.usefixtures("ray_cluster")

_roles = (f"adder{i}" for i in itertools.count())


class Adder(PackedCalls):
    """Adds to its offset, which a new one has to be told."""

    def __init__(self, name: str) -> None:
        self.name, self.offset, self.done = name, -1000, 0

    def ready(self) -> dict[str, Any]:
        return {"name": self.name, "pid": os.getpid()}

    def set_offset(self, offset: int) -> int:
        self.offset = offset
        return self.offset

    def add(self, number: int, seconds: float = 0.0) -> tuple[str, int]:
        time.sleep(seconds)
        self.done += 1
        return self.name, self.offset + number

    def add_pair(self, pair: tuple[int, float]) -> tuple[str, int]:
        return self.add(*pair)

    def add_unless(self, number: int, directory: Path) -> tuple[str, int]:
        """Dies as a killed process does, if nobody has died here before."""
        marker = directory / f"died-{number}"
        if number < 0 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), 9)
        return self.add(abs(number))

    def die(self, number: int) -> None:
        os.kill(os.getpid(), 9)

    def set_offset_unless(self, offset: int, marker: Path) -> int:
        if self.name.endswith("-1") and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), 9)
        return self.set_offset(offset)

    def repeat(self, what: bytes, times: int) -> bytes:
        return what * times

    def refuse(self, number: int) -> None:
        raise UserError(f"row {number} is bad; mend it")

    def fail(self, number: int) -> None:
        raise ZeroDivisionError(f"at {number}")

    def ask(self, other: Remote, method: str) -> Any:
        return other.call(method, 7, timeout_s=10)

    def count(self) -> int:
        return self.done


@pytest.fixture
def make_pool() -> Iterator[Callable[..., Pool]]:
    """Pools of `Adder`s whose offset is 100, gone after the test; names are unique in the cluster."""
    pools = []

    def make(count: int = 2, **options: Any) -> Pool:
        role = next(_roles)

        def spawn(name: str) -> Remote:
            return Remote.spawn(name, Adder, name, local=False, options={"num_cpus": 0})

        settings = {"start_timeout_s": 60, "call_timeout_s": 60} | options
        pools.append(Pool(role, count, spawn, **settings))
        pools[-1].wait_until_ready()
        pools[-1].broadcast("set_offset", 100)
        return pools[-1]

    yield make
    for pool in pools:
        pool.stop()


def pids(pool: Pool) -> list[int]:
    return [member["pid"] for member in pool.wait_until_ready()]


def test_map_keeps_the_order_and_uses_every_member(make_pool: Callable[..., Pool]) -> None:
    pool = make_pool(2)
    # The first piece is slow: the other member does the rest meanwhile.
    started = time.monotonic()
    results = pool.map("add_pair", [(0, 1.0), (1, 0.1), (2, 0.1), (3, 0.1)])
    assert [value for _, value in results] == [100, 101, 102, 103]
    slow, *fast = [name for name, _ in results]
    assert set(fast) == {a.name for a in pool.actors} - {slow}
    assert time.monotonic() - started < 5
    assert pool.map("add", [], 0.0) == []


def test_work_of_a_killed_member_is_done_by_its_replacement(make_pool: Callable[..., Pool], tmp_path: Path) -> None:
    replaced: list[str] = []

    def bring_up_to_date(actor: Remote) -> None:
        replaced.append(actor.name)
        actor.call("set_offset", 100, timeout_s=10)

    pool = make_pool(2, on_new=bring_up_to_date)
    before = pids(pool)
    # -2 kills whoever gets it first.
    results = pool.map("add_unless", [1, -2, 3, 4, 5], tmp_path)
    # Offset -1000 would show: the replacement was brought up to date before it got work.
    assert [value for _, value in results] == [101, 102, 103, 104, 105]
    assert replaced == [f"{pool.role}-2"] and pool.replacements == 1
    assert (tmp_path / "died--2").exists()
    assert len(set(pids(pool)) & set(before)) == 1
    assert {a.name for a in pool.actors} > set(replaced)


def test_a_member_that_died_between_calls(make_pool: Callable[..., Pool]) -> None:
    pool = make_pool(2, on_new=lambda actor: actor.call("set_offset", 100, timeout_s=10))
    os.kill(pids(pool)[0], 9)
    assert [value for _, value in pool.map("add", [1, 2, 3, 4], 0.01)] == [101, 102, 103, 104]
    assert pool.replacements == 1


def test_broadcast_reaches_the_replacement_of_a_member_that_dies_in_it(
    make_pool: Callable[..., Pool], tmp_path: Path
) -> None:
    pool = make_pool(3)
    assert pool.broadcast("set_offset_unless", 200, tmp_path / "died") == [200, 200, 200]
    assert (tmp_path / "died").exists()
    assert pool.replacements == 1
    assert [a.name for a in pool.actors] == [f"{pool.role}-{i}" for i in (0, 3, 2)]
    assert {value for _, value in pool.map("add", [1] * 6, 0.05)} == {201}


def test_deaths_beyond_the_limit_are_an_error(make_pool: Callable[..., Pool]) -> None:
    pool = make_pool(1, max_replacements=2)
    with pytest.raises(ActorDied, match=rf"{pool.role}-2 died during die"):
        pool.map("die", [0])
    assert pool.replacements == 2


def test_a_time_out_names_actor_and_method(make_pool: Callable[..., Pool]) -> None:
    pool = make_pool(1, call_timeout_s=1)
    with pytest.raises(ActorFailure, match=rf"{pool.role}-0\.add did not answer within 1 s.*resources.call_timeout_s"):
        pool.map("add", [1], 5.0)
    with pytest.raises(ActorFailure, match=rf"{pool.role}-0\.add did not answer"):
        pool.broadcast("add", 1, 5.0)


def test_a_pool_that_the_cluster_cannot_hold_is_an_error_in_time() -> None:
    role = next(_roles)
    pool = Pool(
        role,
        1,
        lambda name: Remote.spawn(name, Adder, name, local=False, options={"num_cpus": 999}),
        start_timeout_s=1,
        call_timeout_s=1,
    )
    with pytest.raises(ActorFailure, match=rf"{role}-0\.ready did not answer within 1 s.*resources.start_timeout_s"):
        pool.wait_until_ready()
    pool.stop()


def test_errors_pass_through_and_cost_no_member(make_pool: Callable[..., Pool]) -> None:
    pool = make_pool(2)
    before = pids(pool)
    with pytest.raises(UserError, match=r"^row 3 is bad; mend it$"):
        pool.map("refuse", [3])
    with pytest.raises(ActorFailure, match=rf"{pool.role}-\d\.fail raised (.|\n)*ZeroDivisionError: at 5"):
        pool.broadcast("fail", 5)
    assert pids(pool) == before and pool.replacements == 0


def test_errors_of_a_called_actor_pass_through_the_caller(make_pool: Callable[..., Pool]) -> None:
    """As a generator's do through the coordinator: the user sees the line of the one that failed, and nothing else."""
    one, other = make_pool(2).actors
    with pytest.raises(UserError, match=r"^row 7 is bad; mend it$"):
        one.call("ask", other, "refuse", timeout_s=20)
    with pytest.raises(ActorFailure, match=rf"^{other.name} died during die: ") as failure:
        one.call("ask", other, "die", timeout_s=20)
    assert not isinstance(failure.value, ActorDied)  # the one that was called is alive
    assert "\n" not in str(failure.value)


def test_finished_calls(make_pool: Callable[..., Pool]) -> None:
    slow, fast = make_pool(2).actors
    calls = [slow.submit("add", 1, 3.0), fast.submit("add", 2)]
    assert finished(calls, 10) == [calls[1]]
    assert finished(calls[:1], 0.1) == []
    assert wait(calls, 10) == [(slow.name, 101), (fast.name, 102)]
    assert finished(calls, 10) == calls


def test_packed_calls(make_pool: Callable[..., Pool]) -> None:
    """Results, errors and deaths come as those of plain calls do, whether awaited or by a future."""
    (one,) = make_pool(1).actors
    large = one.submit_packed("repeat", b"x", 10**6)  # comes by way of the object store
    plain, packed, bad, failed = (
        one.submit("add", 1),
        one.submit_packed("add", 2),
        one.submit_packed("refuse", 3),
        one.submit_packed("fail", 5),
    )
    assert wait([plain, packed], 20) == [(one.name, 101), (one.name, 102)]
    assert [answer(call, call.future()) for call in (plain, packed)] == [(one.name, 101), (one.name, 102)]
    assert answer(large, large.future()) == b"x" * 10**6
    with pytest.raises(UserError, match=r"^row 3 is bad; mend it$"):
        answer(bad, bad.future())
    with pytest.raises(ActorFailure, match=rf"{one.name}\.fail raised (.|\n)*ZeroDivisionError: at 5"):
        wait([failed], 20)
    died = one.submit_packed("die", 0)
    with pytest.raises(ActorDied, match=rf"^{one.name} died during die: "):
        answer(died, died.future())


def test_members_at_work(make_pool: Callable[..., Pool], tmp_path: Path) -> None:
    """Many calls of two actors, one of which dies: every answer comes once, the other's in the order of its calls."""
    pool = make_pool(2)
    heard: dict[int, list[int]] = {0: [], 1: []}
    replaced: list[int] = []

    def died(member: Member, death: ActorDied) -> None:
        replaced.append(member.index)
        lost = members.replace(member, death)
        members.ask(member, "set_offset", 100)
        for number in sorted(lost):
            ask(member, number)

    def ask(member: Member, number: int) -> None:
        member.held[number] = None
        then = partial(hear, member, number)
        members.ask(member, "add_unless", number, tmp_path, then=then, packed=True)

    def hear(member: Member, number: int, result: tuple[str, int]) -> None:
        heard[member.index].append(result[1])
        del member.held[number]

    members = Members([pool], died)
    for number in range(100, 150):
        for member in members.of[0]:
            ask(member, number)
    ask(members.of[0][1], -7)
    deadline = time.monotonic() + 60
    while any(member.calls for member in members.of[0]):
        assert time.monotonic() < deadline
        members.settle(members.answers(1.0))
    assert heard[0] == list(range(200, 250))
    assert sorted(heard[1]) == [107, *range(200, 250)] and replaced == [1]


def test_busy_seconds_are_of_the_place_that_worked(make_pool: Callable[..., Pool]) -> None:
    pool = make_pool(2)
    pool.map("add_pair", [(1, 1.0), (2, 0.2)])
    long, short = max(pool.busy_s), min(pool.busy_s)
    assert 1.0 <= long < 1.6 and 0.2 <= short < 0.8


def test_local_objects_answer_alike() -> None:
    pool = Pool(
        "local",
        2,
        lambda name: Remote.spawn(name, Adder, name, local=True),
        start_timeout_s=1,
        call_timeout_s=1,
    )
    assert [member["pid"] for member in pool.wait_until_ready()] == [os.getpid()] * 2
    assert pool.broadcast("set_offset", 5) == [5, 5]
    assert [value for _, value in pool.map("add", [1, 2, 3])] == [6, 7, 8]
    with pytest.raises(UserError, match="row 1 is bad"):
        pool.map("refuse", [1])
    pool.stop()
    assert sum(pool.broadcast("count")) == 3
