"""The pool and `Remote` on a real cluster, with actors that only add: what they promise holds for any actor."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from actors.pools.autopsy import examine_and_end
from actors.pools.dispatch import Dispatcher, map_pieces
from actors.pools.pool import Pool
from actors.pools.remote import ActorDied, ActorFailure, ActorWedged, Remote, SerializedCalls, answer, wait
from actors.pools.worker import Worker
from rayrlhf.errors import UserError

pytestmark = pytest.mark.usefixtures("ray_cluster")

_roles = (f"adder{i}" for i in itertools.count())


class Adder(SerializedCalls):
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

    def add_in_turn(self, number: int, directory: Path) -> tuple[str, int]:
        """The answer to 0 comes after that to 3."""
        deadline = time.monotonic() + 600
        while number == 0 and not (directory / "3").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        (directory / str(number)).touch()
        return self.add(number)

    def wait_for(self, number: int, path: Path) -> tuple[str, int]:
        """Says that it is here, and waits in one call until the file is there."""
        path.with_suffix(f".{number}").touch()
        deadline = time.monotonic() + 600
        while number == 0 and not path.exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return self.add(number)

    def hang(self, path: Path) -> None:
        path.touch()
        threading.Event().wait()

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

    def add_unless_it_hangs(self, number: int, directory: Path) -> tuple[str, int]:
        """Never answers the first call with a negative number."""
        marker = directory / f"hung-{number}"
        if number < 0 and not marker.exists():
            marker.touch()
            threading.Event().wait()
        return self.add(abs(number))

    def repeat(self, what: bytes, times: int) -> bytes:
        return what * times

    def refuse(self, number: int) -> None:
        raise UserError(f"row {number} is bad; mend it")

    def fail(self, number: int) -> None:
        raise ZeroDivisionError(f"at {number}")

    def ask(self, other: Remote, method: str) -> Any:
        return other.call(method, 7, timeout_s=120)

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

        settings = {"start_timeout_s": 120, "call_timeout_s": 120} | options
        pools.append(Pool(role, count, spawn, **settings))
        pools[-1].wait_until_ready()
        pools[-1].broadcast("set_offset", 100)
        return pools[-1]

    yield make
    for pool in pools:
        pool.stop()


def remotes(pool: Pool) -> list[Remote]:
    return [worker.remote for worker in pool.workers]


def pids(pool: Pool) -> list[int]:
    return [member["pid"] for member in pool.wait_until_ready()]


def test_map_keeps_the_order_and_uses_every_member(make_pool: Callable[..., Pool], tmp_path: Path) -> None:
    pool = make_pool(2)
    # The first piece ends last: the other member does the rest meanwhile.
    results = map_pieces(pool, "add_in_turn", [0, 1, 2, 3], tmp_path)
    assert [value for _, value in results] == [100, 101, 102, 103]
    slow, *fast = [name for name, _ in results]
    assert set(fast) == {worker.name for worker in pool.workers} - {slow}
    assert map_pieces(pool, "add", [], 0.0) == []


def settle(pool: Pool, count: int) -> None:
    """Until so many are there."""
    deadline = time.monotonic() + 600
    pool.apply_size()
    while len(pool) != count:
        assert time.monotonic() < deadline
        time.sleep(0.2)
        pool.apply_size()


def test_work_of_a_killed_member_is_done_again_and_a_newcomer_joins(
    make_pool: Callable[..., Pool], tmp_path: Path
) -> None:
    newcomers: list[str] = []

    def bring_up_to_date(worker: Worker) -> None:
        newcomers.append(worker.name)
        worker.remote.call("set_offset", 100, timeout_s=120)

    pool = make_pool(2, on_new=bring_up_to_date)
    before = pids(pool)
    # -2 kills whoever gets it first.
    results = map_pieces(pool, "add_unless", [1, -2, 3, 4, 5], tmp_path)
    assert [value for _, value in results] == [101, 102, 103, 104, 105]
    assert (tmp_path / "died--2").exists() and pool.deaths == 1
    settle(pool, 2)
    assert newcomers == [f"{pool.role}-2"] and pool.workers[-1].name == newcomers[0]
    assert len(set(pids(pool)) & set(before)) == 1
    # Offset -1000 would show: the newcomer was brought up to date before it got work.
    assert set(map_pieces(pool, "add_pair", [(1, 0.3), (2, 0.3)])) == {
        (pool.workers[0].name, 101),
        (pool.workers[1].name, 102),
    }


def test_the_work_of_the_last_member_waits_for_a_newcomer(make_pool: Callable[..., Pool], tmp_path: Path) -> None:
    pool = make_pool(1, on_new=lambda worker: worker.remote.call("set_offset", 100, timeout_s=120))
    assert map_pieces(pool, "add_unless", [1, -2, 3], tmp_path)[1:] == [
        (f"{pool.role}-1", 102),
        (f"{pool.role}-1", 103),
    ]


def test_a_member_that_died_between_calls(make_pool: Callable[..., Pool]) -> None:
    pool = make_pool(2, on_new=lambda worker: worker.remote.call("set_offset", 100, timeout_s=120))
    os.kill(pids(pool)[0], 9)
    assert [value for _, value in map_pieces(pool, "add", [1, 2, 3, 4], 0.01)] == [101, 102, 103, 104]
    assert pool.deaths == 1


def test_who_dies_in_a_broadcast_is_left_out(make_pool: Callable[..., Pool], tmp_path: Path) -> None:
    pool = make_pool(3, on_new=lambda worker: worker.remote.call("set_offset", 300, timeout_s=120))
    assert pool.broadcast("set_offset_unless", 200, tmp_path / "died") == [200, 200]
    assert (tmp_path / "died").exists() and pool.deaths == 1
    settle(pool, 3)
    assert [worker.name for worker in pool.workers] == [f"{pool.role}-{i}" for i in (0, 2, 3)]
    assert {value for _, value in map_pieces(pool, "add", [1] * 6, 0.05)} == {201, 301}


def test_without_room_for_a_newcomer_the_others_go_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As when a spot node goes and none comes. With nobody left it is an error in time, which names who is waited for.

    Afterwards there may be room for a newcomer, who then joins: see test_node_loss.
    """
    role = next(_roles)

    def spawn(name: str) -> Remote:
        cpus = 0 if name in (f"{role}-0", f"{role}-1") else 999
        return Remote.spawn(name, Adder, name, local=False, options={"num_cpus": cpus})

    pool = Pool(role, 2, spawn, start_timeout_s=120, call_timeout_s=120)
    pool.wait_until_ready()
    pool.newcomer_timeout_s = 1.0
    pool.broadcast("set_offset", 100)
    pieces = [1, -2, 3, 4]
    assert [value for _, value in map_pieces(pool, "add_unless", pieces, tmp_path)] == [101, 102, 103, 104]
    assert len(pool) == 1 and pool.wanted == 2 and not pool.steady
    deadline = time.monotonic() + 600
    while not pool.steady:
        assert time.monotonic() < deadline
        time.sleep(0.1)
        pool.apply_size()
    pool.apply_size()  # it is said once
    said = [record.message for record in caplog.records]
    assert [f"{role}-2 is not up after 1 s" in line for line in said] == [False, True], said
    assert said[1].endswith(f"1 {role}s go on (wanted: 2), on their way: {role}-2")
    assert len(pool) == 1 and pool.steady
    assert [value for _, value in map_pieces(pool, "add", [5, 6])] == [105, 106]

    # A kill from here might come after the answer.
    with pytest.raises(ActorFailure, match=rf"{role}-3\.ready did not answer within 1 s.*resources.start_timeout_s"):
        map_pieces(pool, "die", [7])
    pool.stop()


def test_deaths_beyond_the_limit_are_an_error(make_pool: Callable[..., Pool]) -> None:
    pool = make_pool(1, max_replacements=2)
    with pytest.raises(ActorDied, match=rf"{pool.role}-2 died during die"):
        map_pieces(pool, "die", [0])
    assert pool.deaths == 3


def test_all_may_die_at_once(make_pool: Callable[..., Pool]) -> None:
    """As they do with their nodes: that is not the work's fault."""
    pool = make_pool(3, max_replacements=1, on_new=lambda worker: worker.remote.call("set_offset", 100, timeout_s=120))
    for pid in pids(pool):
        os.kill(pid, 9)
    assert [value for _, value in map_pieces(pool, "add", [1, 2, 3])] == [101, 102, 103]
    assert pool.deaths == 3
    settle(pool, 3)


class StillBorn(Adder):
    def ready(self) -> dict[str, Any]:
        os.kill(os.getpid(), 9)
        return {}


def test_newcomers_that_die_are_an_error_each_time_when_nobody_is_left() -> None:
    role = next(_roles)

    def spawn(name: str) -> Remote:
        return Remote.spawn(
            name, Adder if name == f"{role}-0" else StillBorn, name, local=False, options={"num_cpus": 0}
        )

    pool = Pool(role, 1, spawn, start_timeout_s=120, call_timeout_s=120, max_replacements=2)
    pool.wait_until_ready()
    with pytest.raises(ActorDied, match=rf"{role}-2 died during ready"):
        map_pieces(pool, "die", [1])
    pool.reset_deaths()  # a learner that comes back
    with pytest.raises(ActorDied, match=rf"{role}-5 died during ready"):
        pool.apply_size()
    assert pool.deaths == 6
    pool.stop()


def test_a_newcomer_that_cannot_be_brought_up_to_date_is_given_up(make_pool: Callable[..., Pool]) -> None:
    def refuse(worker: Worker) -> None:
        raise ActorFailure(f"{worker.name} refuses")

    pool = make_pool(2, on_new=refuse)
    os.kill(pids(pool)[0], 9)
    assert [value for _, value in map_pieces(pool, "add", [1, 2, 3])] == [101, 102, 103]
    deadline = time.monotonic() + 600
    while pool.wanted == 2:
        assert time.monotonic() < deadline
        time.sleep(0.2)
        pool.apply_size()
    assert [worker.name for worker in pool.workers] == [f"{pool.role}-1"] and not pool.joining


def test_who_is_wanted_again_while_the_last_one_leaves_comes_back(make_pool: Callable[..., Pool]) -> None:
    pool = make_pool(2)
    pool.scale(1)
    leaver = pool.workers[-1]  # has been looked at before the next line, as by another thread
    pool.scale(2)
    pool.dismiss(leaver)
    settle(pool, 2)
    assert [worker.name for worker in pool.workers] == [f"{pool.role}-{i}" for i in (0, 2)]


def test_a_time_out_names_actor_and_method(make_pool: Callable[..., Pool]) -> None:
    pool = make_pool(1)
    pool.call_timeout_s = 1
    # The first one is replaced; that the second one does not answer either is an error.
    with pytest.raises(ActorFailure, match=rf"{pool.role}-1\.add did not answer within 1 s.*resources.call_timeout_s"):
        map_pieces(pool, "add", [1], 5.0)
    with pytest.raises(ActorFailure, match=rf"{pool.role}-1\.add did not answer"):
        pool.broadcast("add", 1, 5.0)


def test_work_of_an_actor_that_answers_nothing_goes_to_another(make_pool: Callable[..., Pool], tmp_path: Path) -> None:
    pool = make_pool(2, call_timeout_s=10, on_new=lambda worker: worker.remote.call("set_offset", 100, timeout_s=120))
    before = pids(pool)
    results = map_pieces(pool, "add_unless_it_hangs", [1, -2, 3], tmp_path)
    assert [value for _, value in results] == [101, 102, 103]
    assert (tmp_path / "hung--2").exists() and pool.deaths == 1
    settle(pool, 2)
    after = pids(pool)
    assert len(set(before) & set(after)) == 1
    (hung,) = set(before) - set(after)
    deadline = time.monotonic() + 600
    while Path(f"/proc/{hung}").exists():  # it would keep its resources
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_a_stopped_process_is_found_by_its_silence_and_replaced(
    make_pool: Callable[..., Pool], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Long before its call would be late. Those that work in one call all the while are left alone, and so is a start.

    Both processes are in their calls before one of them is stopped, and what it has goes to the other.
    """
    pool = make_pool(
        2, heartbeat_timeout_s=3.0, call_timeout_s=600, on_new=lambda worker: worker.remote.call(
            "set_offset", 100, timeout_s=120
        ),
    )  # fmt: skip
    stopped, working = pids(pool)
    here = tmp_path / "go"

    def stop() -> None:
        while not all(here.with_suffix(f".{number}").exists() for number in (0, 1)):
            time.sleep(0.05)
        os.kill(stopped, signal.SIGSTOP)

    threading.Thread(target=stop, daemon=True).start()
    lost: list[dict[int, Any]] = []
    done: list[tuple[str, int]] = []

    def on_loss(worker: Worker, held: dict[int, Any]) -> None:
        lost.append(held)
        here.touch()  # the other one may end its call now

    with Dispatcher([pool], on_loss=on_loss) as dispatcher:
        first, other = pool.workers
        for number, worker in enumerate((other, first)):
            worker.held[number] = None
            dispatcher.submit(worker, "wait_for", number, here, then=done.append)
        # It works for good, so that only its silence can tell.
        dispatcher.submit(first, "hang", here.with_suffix(".hangs"))
        deadline = time.monotonic() + 600
        while (other.name, 100) not in done or not lost:
            assert time.monotonic() < deadline
            dispatcher.deliver(dispatcher.poll(0.5))
    assert pool.deaths == 1
    assert first not in pool.workers and other in pool.workers
    deadline = time.monotonic() + 600
    while Path(f"/proc/{stopped}").exists() and "\nState:\tZ" not in Path(f"/proc/{stopped}/status").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    (said,) = [record for record in caplog.records if "wedged" in record.message]
    assert said.message.startswith(
        f"{first.name} is wedged: its process is there, and has given no sign of life for 3 s"
    )
    assert f"process {stopped}: state T" in said.whole  # type: ignore[attr-defined]
    assert working in {member["pid"] for member in pool.broadcast("ready")}


def test_beats_tell_one_that_works_from_one_that_waits(make_pool: Callable[..., Pool], tmp_path: Path) -> None:
    """A call that hangs while the process lives: it beats, and does not move; then it is a death as any other."""
    pool = make_pool(2, heartbeat_timeout_s=1.0, call_timeout_s=600)
    hangs, works = pool.workers
    marker, go = tmp_path / "hangs", tmp_path / "go"
    stuck, busy = hangs.remote.submit("hang", marker), works.remote.submit("wait_for", 0, go)
    deadline = time.monotonic() + 600
    while pool.heartbeat.still_s(hangs) < 4.0:
        assert time.monotonic() < deadline
        pool.heartbeat.look()
        time.sleep(0.05)
    assert type(pool.heartbeat.overdue(hangs, stuck, 600)) is ActorWedged
    # It looks for the file twenty times a second.
    assert pool.heartbeat.still_s(works) < pool.heartbeat.still_s(hangs)
    go.touch()
    assert wait([busy], 120) == [(works.name, 100)]
    beat = pool.heartbeat._heard[hangs].beat
    assert beat is not None
    whole = examine_and_end(beat)
    assert f"process {beat.pid}: state S" in whole and "hang" in whole and "test_pool.py" in whole
    while Path(f"/proc/{beat.pid}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert examine_and_end(beat) == f"process {beat.pid} is gone"


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
        map_pieces(pool, "refuse", [3])
    with pytest.raises(ActorFailure, match=rf"{pool.role}-\d\.fail raised ZeroDivisionError: at 5$"):
        pool.broadcast("fail", 5)
    assert pids(pool) == before and pool.deaths == 0


def test_errors_of_a_called_actor_pass_through_the_caller(make_pool: Callable[..., Pool]) -> None:
    """As a generator's do through the coordinator: the user sees the line of the one that failed, and nothing else."""
    one, other = remotes(make_pool(2))
    with pytest.raises(UserError, match=r"^row 7 is bad; mend it$"):
        one.call("ask", other, "refuse", timeout_s=120)
    with pytest.raises(ActorFailure, match=rf"^{other.name} died during die: ") as failure:
        one.call("ask", other, "die", timeout_s=120)
    assert not isinstance(failure.value, ActorDied)  # the one that was called is alive
    assert "\n" not in str(failure.value)


def test_serialized_calls(make_pool: Callable[..., Pool]) -> None:
    """Results, errors and deaths come as those of plain calls do, whether awaited or by a future."""
    (one,) = remotes(make_pool(1))
    large = one.submit_serialized("repeat", b"x", 10**6)  # comes by way of the object store
    plain, packed, bad, failed = (
        one.submit("add", 1),
        one.submit_serialized("add", 2),
        one.submit_serialized("refuse", 3),
        one.submit_serialized("fail", 5),
    )
    assert wait([plain, packed], 120) == [(one.name, 101), (one.name, 102)]
    assert [answer(call, call.future()) for call in (plain, packed)] == [(one.name, 101), (one.name, 102)]
    assert answer(large, large.future()) == b"x" * 10**6
    with pytest.raises(UserError, match=r"^row 3 is bad; mend it$"):
        answer(bad, bad.future())
    with pytest.raises(ActorFailure, match=rf"{one.name}\.fail raised ZeroDivisionError: at 5$"):
        wait([failed], 120)
    died = one.submit_serialized("die", 0)
    with pytest.raises(ActorDied, match=rf"^{one.name} died during die: "):
        answer(died, died.future())


def test_workers_at_work(make_pool: Callable[..., Pool], tmp_path: Path) -> None:
    """Many calls of two actors, one of which dies: every answer comes once, in the order of each one's calls.

    What the dead one had goes to the other, and a newcomer takes part.
    """
    pool = make_pool(2)
    heard: dict[str, list[int]] = {f"{pool.role}-{i}": [] for i in range(3)}

    def on_loss(worker: Worker, held: dict[int, Any]) -> None:
        for number in sorted(held):
            submit(pool.workers[0], number)

    def submit(worker: Worker, number: int) -> None:
        worker.held[number] = None
        then = partial(hear, worker, number)
        dispatcher.submit(worker, "add_unless", number, tmp_path, then=then, serialized=True)

    def hear(worker: Worker, number: int, result: tuple[str, int]) -> None:
        assert result[0] == worker.name
        heard[worker.name].append(result[1])
        del worker.held[number]

    def work() -> None:
        deadline = time.monotonic() + 600
        while dispatcher.busy:
            assert time.monotonic() < deadline
            dispatcher.deliver(dispatcher.poll(1.0))

    dispatcher = Dispatcher([pool], on_loss)
    for number in range(100, 150):
        for i, worker in enumerate(pool.workers):
            submit(worker, number + 100 * i)
    submit(pool.workers[0], -7)
    work()
    survivor, newcomer = f"{pool.role}-1", f"{pool.role}-2"
    assert heard[f"{pool.role}-0"] == list(range(200, 200 + len(heard[f"{pool.role}-0"])))
    assert heard[survivor][:50] == list(range(300, 350))
    assert sorted(heard[f"{pool.role}-0"] + heard[survivor]) == [107, *range(200, 250), *range(300, 350)]

    deadline = time.monotonic() + 600
    while not pool.admit_ready():
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert [(worker.name, worker.number) for worker in pool.workers] == [(survivor, 1), (newcomer, 2)]
    dispatcher.submit(pool.workers[1], "set_offset", 100)
    submit(pool.workers[1], 900)
    work()
    assert heard[newcomer] == [1000]


def test_busy_seconds_are_of_the_actor_that_worked(make_pool: Callable[..., Pool]) -> None:
    pool = make_pool(2)
    map_pieces(pool, "add_pair", [(1, 1.0), (2, 0.2)])
    assert list(pool.busy_s()) == [worker.name for worker in pool.workers]
    # An upper limit would ask for a fast machine; unit/test_dispatch has a clock of its own.
    long, short = pool.busy_s().values()
    assert long >= 1.0 and short >= 0.2


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
    assert [value for _, value in map_pieces(pool, "add", [1, 2, 3])] == [6, 7, 8]
    with pytest.raises(UserError, match="row 1 is bad"):
        map_pieces(pool, "refuse", [1])
    pool.stop()
    assert sum(pool.broadcast("count")) == 3
