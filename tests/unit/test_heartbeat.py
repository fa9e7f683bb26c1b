"""Who is alive and gives no sign of life, who hangs in a call, and who is only slow: by beats and a clock by hand."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from actors.pools.beats import Beat, _place
from actors.pools.heartbeat import Heartbeat
from actors.pools.pool import Pool
from actors.pools.remote import ActorLate, ActorWedged, CouldNotStart
from actors.pools.stragglers import Stragglers
from actors.pools.worker import Worker
from tests.unit.test_dispatch import ByHand, Clock, Log


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("actors.pools.heartbeat.time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


class Beats:
    """The beats of workers by their names, as `read_beats` finds them."""

    def __init__(self) -> None:
        self.of: dict[str, Beat] = {}
        self.away = False
        self._names: dict[str, str] = {}

    def follow(self, worker: Worker) -> None:
        """`begin_beats` has told the worker its key."""
        assert isinstance(worker.remote, ByHand)
        self._names[worker.remote.given["begin_beats"][0]] = worker.name

    def beat(self, *names: str, moves: bool = True) -> None:
        for name in names:
            last = self.of.get(name, Beat(0, 0, 1, 1, "node", (3, "file")))
            self.of[name] = last._replace(number=last.number + 1, moves=last.moves + moves)

    def read(self, keys: Sequence[str]) -> Mapping[str, Beat] | None:
        return None if self.away else {key: self.of[name] for key in keys if (name := self._names[key]) in self.of}


def started(limit_s: float, *names: str) -> tuple[Heartbeat, Beats, list[Worker]]:
    beats = Beats()
    heartbeat = Heartbeat(limit_s, beats.read)
    workers = [Worker(ByHand(name), number) for number, name in enumerate(names)]
    for worker in workers:
        heartbeat.begin(worker)
        beats.follow(worker)
    return heartbeat, beats, workers


def test_one_that_is_silent_is_found_and_one_that_beats_is_not(clock: Clock) -> None:
    heartbeat, beats, (a, b) = started(60.0, "a", "b")
    beats.beat("a", "b")
    for second in range(5, 61, 5):
        clock.now = second
        assert heartbeat.look() == [], second
        beats.beat("a")
    clock.now = 65
    assert heartbeat.look() == [b] and heartbeat.still_s(b) == 60 and heartbeat.still_s(a) == 0
    beats.beat("b")  # it was only very late
    clock.now = 70
    assert heartbeat.look() == []
    for clock.now in range(75, 131, 5):
        heartbeat.look()
        beats.beat("a")
    assert heartbeat.look() == [b]
    heartbeat.excuse(b)  # it was found alive by other means
    assert heartbeat.look() == []
    assert heartbeat.forget(b) == beats.of["b"] and heartbeat.forget(b) is None


def test_a_slow_start_is_no_silence(clock: Clock) -> None:
    """It is in its constructor, or in another call, and has not begun to beat: `start_timeout_s` looks after that."""
    heartbeat, beats, _ = started(60.0, "a")
    for second in range(5, 3600, 5):
        clock.now = second
        assert heartbeat.look() == []
    beats.beat("a")
    clock.now = 3600
    assert heartbeat.look() == []


def test_nobody_is_blamed_for_a_pause_of_who_looks_or_of_rays_store(clock: Clock) -> None:
    heartbeat, beats, (a,) = started(60.0, "a")
    beats.beat("a")
    clock.now = 5
    heartbeat.look()
    clock.now = 3605  # this process was stopped for an hour, or did something else
    assert heartbeat.look() == [] and heartbeat.still_s(a) == 10
    beats.away = True
    for second in range(3610, 7200, 5):
        clock.now = second
        assert heartbeat.look() == []
    assert heartbeat.still_s(a) == 10


def test_one_that_beats_and_does_not_move(clock: Clock) -> None:
    heartbeat, beats, (a,) = started(60.0, "a")
    for second in range(5, 101, 5):
        clock.now = second
        beats.beat("a", moves=False)
        assert heartbeat.look() == []
    assert heartbeat.still_s(a) == 95  # from the second beat on
    beats.beat("a")
    clock.now = 105
    heartbeat.look()
    assert heartbeat.still_s(a) == 0


def test_without_a_limit_nobody_beats(clock: Clock) -> None:
    worker = Worker(ByHand("a"), 0)
    heartbeat = Heartbeat(None)
    heartbeat.begin(worker)
    clock.now = 1e6
    assert heartbeat.look() == [] and not worker.remote.asked and heartbeat.still_s(worker) == 0  # type: ignore[attr-defined]


def test_where_a_thread_is_changes_with_what_it_does() -> None:
    ready, go_on, there = threading.Barrier(2), threading.Event(), threading.Barrier(2)
    end = threading.Event()

    def work() -> None:
        ready.wait()
        go_on.wait()
        there.wait()
        end.wait()

    thread = threading.Thread(target=work)
    thread.start()
    assert thread.ident is not None

    def settled() -> int:
        """Where it is once it waits: the same in many looks."""
        places: list[int] = []
        while len(places) < 50 or len({*places[-50:]}) > 1:
            places.append(_place(thread.ident or 0))
            time.sleep(0.002)
        return places[-1]

    ready.wait()
    first = settled()
    assert first == settled()
    go_on.set()
    there.wait()
    assert settled() != first
    end.set()
    thread.join()
    assert _place(thread.ident) == hash(())


# ---- the pool


@pytest.fixture
def pool(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Pool:
    """Two workers who beat; what a process that hangs is at is only said."""
    monkeypatch.setattr("actors.pools.pool.examine_and_end", lambda beat: f"stacks of {beat.pid}")
    monkeypatch.setattr("actors.pools.heartbeat.forget_beats", lambda key: None)
    pool = Pool("worker", 2, ByHand, start_timeout_s=5, call_timeout_s=600, heartbeat_timeout_s=60)
    pool.beats = beats = Beats()  # type: ignore[attr-defined]
    pool.heartbeat = Heartbeat(60.0, beats.read)
    for worker in pool.workers:
        pool.heartbeat.begin(worker)
        beats.follow(worker)
    return pool


def test_all_that_are_wedged_are_replaced_and_their_work_goes_back(
    pool: Pool, clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Two in one round as well: that is no sign of a time-out that is too short."""
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)
    log, beats = Log(pool), pool.beats  # type: ignore[attr-defined]
    log.submit(pool.workers[0], "work")
    pool.workers[0].held[7] = "its work"
    beats.beat("worker-0", "worker-1")
    for second in range(5, 71, 5):
        clock.now = second
        log.settle()
        beats.beat("worker-1")
    assert [worker.name for worker in pool.workers] == ["worker-1"] and log.lost == [{7: "its work"}]
    for second in range(75, 141, 5):
        clock.now = second
        log.settle()
    assert not pool.workers and pool.deaths == 2
    assert [newcomer.actor.name for newcomer in pool.joining] == ["worker-2", "worker-3"]
    first, second_ = caplog.records
    assert first.message.startswith("worker-0 is wedged: its process is there, and has given no sign of life for 60 s")
    assert first.message.endswith("on their way: worker-2; 3 of 4 replacements left")
    assert second_.message.endswith("2 of 4 replacements left")
    assert first.whole == "stacks of 1"  # type: ignore[attr-defined]


def test_a_call_that_takes_too_long_hangs_or_is_slow(pool: Pool, clock: Clock) -> None:
    beats, (hangs, slow) = pool.beats, pool.workers  # type: ignore[attr-defined]
    call = slow.remote.submit("score")
    for second in range(5, 700, 5):
        clock.now = second
        beats.beat("worker-0", moves=False)
        beats.beat("worker-1")
        assert pool.heartbeat.look() == []
    stuck = pool.heartbeat.overdue(hangs, call, 600)
    assert type(stuck) is ActorWedged and "has not moved for 690 s" in str(stuck)
    assert type(pool.heartbeat.overdue(slow, call, 600)) is ActorLate


def test_a_broadcast_goes_on_without_one_that_is_wedged(pool: Pool, clock: Clock) -> None:
    beats, (wedged, other) = pool.beats, pool.workers  # type: ignore[attr-defined]
    beats.beat("worker-0", "worker-1")

    def read(keys: Sequence[str]) -> Mapping[str, Beat] | None:
        clock.now += 10  # each look finds the other one alive; the answers come at once, or never
        beats.beat("worker-1")
        return Beats.read(beats, keys)

    pool.heartbeat._read = read
    clock.now = 10
    threading.Thread(target=_answers, args=(other.remote,)).start()
    assert pool.broadcast("load") == ["loaded"]
    assert pool.workers == [other] and pool.deaths == 1
    assert wedged not in pool.workers


def _answers(remote: Any) -> None:
    while "load" not in remote.asked:
        time.sleep(0.01)
    remote.asked["load"].set_result("loaded")


def test_a_newcomer_that_cannot_start_twice_in_the_same_way_is_no_third_time_tried(pool: Pool) -> None:
    def fail(words: str) -> None:
        newcomer = pool.joining[-1]
        newcomer.answer.set_exception(CouldNotStart(f"{newcomer.actor.name} could not start: {words}"))
        pool.admit_ready()

    pool.scale(3)
    fail("ValueError: a")
    fail("ValueError: b")
    assert pool.wanted == 3 and pool.joining[-1].actor.name == "worker-4"
    fail("ValueError: b")
    assert pool.wanted == 2 and not pool.joining and pool.deaths == 2
    pool.reset_deaths()
    pool.scale(3)
    fail("ValueError: b")
    assert pool.wanted == 3
    fail("OSError: No space left on device")  # whoever comes meets it again
    assert pool.wanted == 2 and not pool.joining


# ---- stragglers


def test_a_straggler_is_reported_once_by_name() -> None:
    workers = [Worker(ByHand(f"generator-{i}"), i, busy_s=40.0, done=200) for i in range(4)]
    stragglers, slow = Stragglers(), workers[2]
    slow.done = 19  # with the piece that it is at 20, which is exactly a tenth
    assert stragglers.look(workers, now=0.0) == []
    slow.done = 18
    (line,) = stragglers.look(workers, now=0.0)
    assert line.startswith(
        "generator-2 is a straggler: 18 pieces of work in 40 s, in which the median of the others does 200"
    )
    assert stragglers.look(workers, now=0.0) == []
    assert stragglers.look([slow], now=0.0) == []  # slower than whom?
    early = [Worker(ByHand("a"), 0, busy_s=29.0, done=0), Worker(ByHand("b"), 1, busy_s=29.0, done=900)]
    assert Stragglers().look(early, now=0.0) == []


def test_one_that_becomes_slow_after_hours_is_a_straggler_too() -> None:
    workers = [Worker(ByHand(f"scorer-{i}"), i) for i in range(2)]
    stragglers, found = Stragglers(), []
    for second in range(10, 12_000, 10):
        for worker in workers:
            worker.busy_s += 10
            worker.done += 10 if worker.number or second < 10_000 else 0
        found += [(second, line.split(" ")[0]) for line in stragglers.look(workers, now=0.0)]
    assert [name for _, name in found] == ["scorer-0"] and 10_000 < found[0][0] < 11_300
