"""Learner ranks that give no sign of life: the driver finds them, has them examined, and kills them.

What Ray Train makes of it is the same as of any death: it starts all ranks again from the newest checkpoint.

A rank may stand still for minutes and be well: it waits in a collective for another rank, or for a batch. So a rank is
suspected for missing beats alone, which come from a thread of their own (`actors.pools.beats`). One call that holds
Python's lock keeps beats back, too. So a suspect is looked at from outside before it is killed: its process has to be
stopped, or its work thread must have had no CPU for seconds. Whether a node is gone is for Ray to find out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from actors.pools.autopsy import end, examine_if_still
from actors.pools.heartbeat import SilenceCounter
from actors.training.tasks import BeatingRank, Failed


class SilentRanks:
    """Of one worker group after the other. One thread uses it."""

    def __init__(self, limit_s: float | None, ask: Callable[..., Any]) -> None:
        """
        Args:
            limit_s: seconds of silence after which a rank is looked at; None: no rank beats.
            ask: calls a method of `Tasks` and returns its answer.
        """
        self._beats: SilenceCounter[BeatingRank] = SilenceCounter(limit_s)
        self._ask = ask

    @property
    def every_s(self) -> float | None:
        """Seconds between two beats of a rank; None if it need not beat."""
        return self._beats.every_s or None

    def look(self) -> None:
        """Kill the ranks that are wedged; `Tasks` is told why, before Ray Train sees them die."""
        if self.every_s is None:
            return
        now: list[BeatingRank] = self._ask("beating")
        for rank in {*self._beats.members} - {*now}:
            self._beats.forget(rank)
        for rank in now:
            if rank not in self._beats.members:
                self._beats.expect(rank, rank.key)
        for rank in self._beats.look():
            self._examine(rank)

    def forget_all(self) -> None:
        """The ranks are gone, or about to be."""
        for rank in self._beats.members:
            self._beats.forget(rank)

    def _examine(self, rank: BeatingRank) -> None:
        beat = self._beats.last_beat(rank)
        assert beat is not None, "silence counts from the first beat on"
        self._beats.excuse(rank)  # it is looked at again after as much silence
        whole = examine_if_still(beat)
        if whole:
            cause = (
                f"learner rank {rank.number} gave no sign of life for {self._beats.limit_s:g} s and was killed "
                "(resources.heartbeat_timeout_s)"
            )
            self._ask("rank_silent", rank, Failed(cause, None, f"learner rank {rank.number}, {whole}"))
            end(beat)
