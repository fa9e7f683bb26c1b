"""Which learner ranks are killed for their silence, by beats, a clock and looks from outside by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from actors.pools.beats import Beat
from actors.training.silent_ranks import SilentRanks
from actors.training.tasks import BeatingRank


class Group:
    """The ranks of a worker group by the keys of their beats, and all that is done to them, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ranks: list[BeatingRank] = []
        self.beats: dict[str, Beat] = {}
        self.still: set[int] = set()
        """Processes that stand still."""
        self.done: list[Any] = []
        self.now = 0.0
        monkeypatch.setattr("actors.pools.heartbeat.time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr("actors.pools.heartbeat.forget_beats", lambda key: None)
        monkeypatch.setattr("actors.training.silent_ranks.examine_if_still", self._examine)
        monkeypatch.setattr("actors.training.silent_ranks.end", lambda beat: self.done.append(("end", beat.pid)))
        self.silent_ranks = SilentRanks(60.0, self._ask)
        self.silent_ranks._beats._read = self._read

    def start(self, *keys: str) -> None:
        self.ranks = [BeatingRank(number, key) for number, key in enumerate(keys)]

    def beat(self, *keys: str) -> None:
        for key in keys:
            last = self.beats.get(key, Beat(0, 0, ord(key), 1, "node", (3, "file")))
            self.beats[key] = last._replace(number=last.number + 1)

    def wait(self, seconds: int, *beating: str) -> None:
        for _ in range(0, seconds, 5):
            self.now += 5
            self.beat(*beating)
            self.silent_ranks.look()

    def _ask(self, method: str, *args: Any) -> Any:
        if method == "beating":
            return self.ranks
        self.done.append((method, *args))
        return None

    def _examine(self, beat: Beat) -> str:
        self.done.append(("examine", beat.pid))
        return "its stacks" if beat.pid in self.still else ""

    def _read(self, keys: Sequence[str]) -> Mapping[str, Beat]:
        return {key: self.beats[key] for key in keys if key in self.beats}


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Group:
    return Group(monkeypatch)


def test_a_silent_rank_that_stands_still_is_killed_and_why_is_told_before(group: Group) -> None:
    """Rank 1 only: rank 0 may wait for it, and beats."""
    group.start("a", "b")
    group.beat("a", "b")
    group.still |= {ord("a"), ord("b")}
    group.wait(60, "a")
    assert group.done == []
    group.wait(5, "a")
    examined, (told, rank, failed), ended = group.done
    assert (examined, told, rank, ended) == (
        ("examine", ord("b")),
        "rank_silent",
        BeatingRank(1, "b"),
        ("end", ord("b")),
    )
    assert failed.cause == (
        "learner rank 1 gave no sign of life for 60 s and was killed (resources.heartbeat_timeout_s)"
    )
    assert failed.traceback == "learner rank 1, its stacks"


def test_one_that_works_without_beats_is_looked_at_again_after_as_much_silence(group: Group) -> None:
    group.start("a")
    group.beat("a")
    group.wait(180)
    assert group.done == [("examine", ord("a"))] * 2
    group.still.add(ord("a"))
    group.wait(10)
    assert group.done[2:3] == [("examine", ord("a"))] and group.done[-1] == ("end", ord("a"))


def test_ranks_that_start_have_no_beat_yet_and_those_before_them_do_not_count(group: Group) -> None:
    group.start("a", "b")
    group.beat("a", "b")
    group.still |= {ord(key) for key in "abcd"}
    group.wait(40)
    group.start()  # one of them died
    group.wait(600)
    group.start("c", "d")
    group.wait(600)
    group.wait(600, "c", "d")
    assert group.done == []


def test_a_pause_of_the_whole_machine_is_no_silence(group: Group) -> None:
    group.start("a")
    group.beat("a")
    group.still.add(ord("a"))
    group.wait(30, "a")
    group.now += 7200
    group.silent_ranks.look()
    group.wait(600, "a")
    assert group.done == []


def test_without_a_limit_nobody_is_looked_at() -> None:
    silent_ranks = SilentRanks(None, lambda method: pytest.fail(method))
    silent_ranks.look()
    assert silent_ranks.every_s is None
