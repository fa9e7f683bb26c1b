"""Who is alive and gives no sign of life, by the beats of processes (`actors.pools.beats`).

    begin(worker)    once it is ready: a slow start is the business of `start_timeout_s`, not of this
    look()           every second or so: those that have been silent for `limit_s`
    still_s(worker)  for how long a worker that beats has not moved

Silence is counted by looks. If nobody looked for an hour, or this whole machine stood still, then only the time of one
look has passed for the others: nobody is blamed for the pause of the one who looks.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from actors.pools.beats import Beat, forget_beats, read_beats
from actors.pools.remote import ActorFailure, ActorWedged, Call, late
from actors.pools.worker import Worker

_BEATS = 12
"""So many beats fit into the time after which one that is silent counts as wedged."""

Member = TypeVar("Member", bound=Hashable)


@dataclass
class _Heard:
    key: str
    beat: Beat | None = None
    silent_s: float = 0.0
    still_s: float = 0.0


class SilenceCounter(Generic[Member]):
    """For how long each of some processes has been silent, and has not moved. One thread uses it."""

    def __init__(
        self,
        limit_s: float | None,
        read: Callable[[Sequence[str]], Mapping[str, Beat] | None] = read_beats,
    ) -> None:
        """
        Args:
            limit_s: seconds of silence after which a process counts as wedged; None: nobody beats.
            read: the newest beats under some keys; None if they cannot be read.
        """
        self.limit_s, self._read = limit_s, read
        self.every_s = (limit_s or 0.0) / _BEATS
        self._looked = time.monotonic()
        self._heard: dict[Member, _Heard] = {}

    @property
    def members(self) -> list[Member]:
        """Those whose beats are counted."""
        return list(self._heard)

    def expect(self, member: Member, key: str) -> None:
        """Beats of a process will come under `key`; its silence counts from the first one on."""
        self._heard[member] = _Heard(key)

    def forget(self, member: Member) -> Beat | None:
        """A process is gone, or about to be; returns its last beat."""
        heard = self._heard.pop(member, None)
        if heard is None:
            return None
        forget_beats(heard.key)
        return heard.beat

    def last_beat(self, member: Member) -> Beat | None:
        """The newest beat of a process, if there was any."""
        return self._heard[member].beat

    def excuse(self, member: Member) -> None:
        """A process was found alive by other means: its silence counts anew."""
        self._heard[member].silent_s = 0.0

    def look(self) -> list[Member]:
        """Those that are silent for too long by now."""
        now = time.monotonic()
        if self._heard and now - self._looked >= self.every_s:
            passed, self._looked = min(now - self._looked, 2 * self.every_s), now
            beats = self._read([heard.key for heard in self._heard.values()])
            if beats is not None:
                for heard in self._heard.values():
                    self._hear(heard, beats.get(heard.key), passed)
        return [m for m, heard in self._heard.items() if self.limit_s and heard.silent_s >= self.limit_s]

    def still_s(self, member: Member) -> float:
        """For how many seconds a process has not moved, as far as anybody looked; 0 if nothing is known of it."""
        return self._heard[member].still_s if member in self._heard else 0.0

    def _hear(self, heard: _Heard, beat: Beat | None, passed: float) -> None:
        last, heard.beat = heard.beat, beat or heard.beat
        if last is None or beat is None:
            return  # its first beat, or not even that: it has other calls before it
        heard.silent_s = heard.silent_s + passed if beat.number == last.number else 0.0
        heard.still_s = heard.still_s + passed if beat.moves == last.moves else 0.0


class Heartbeat(SilenceCounter[Worker]):
    """Of the workers of one pool."""

    def begin(self, worker: Worker) -> None:
        """Have a worker beat that is ready; does nothing if it does already."""
        if self.limit_s is not None and worker not in self._heard:
            self.expect(worker, key := uuid.uuid4().hex)
            worker.remote.submit("begin_beats", key, self.every_s)

    def wedged(self, worker: Worker) -> ActorWedged:
        """The error for a worker that is silent for too long."""
        return ActorWedged(
            f"{worker.name} is wedged: its process is there, and has given no sign of life for {self.limit_s:g} s "
            "(resources.heartbeat_timeout_s)"
        )

    def overdue(self, worker: Worker, call: Call, timeout_s: float) -> ActorFailure:
        """The error for a worker whose call takes too long: it hangs if it has not moved of late, or it is slow."""
        still_s = self.still_s(worker)
        if self.limit_s is None or still_s < self.limit_s:
            return late(call, timeout_s)
        return ActorWedged(
            f"{worker.name} is wedged: {call.method} has not answered for {timeout_s:g} s, and its work has not moved "
            f"for {still_s:.0f} s"
        )
