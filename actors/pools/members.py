"""Actors that are kept at work: each has a queue of calls, and the answers of all are awaited together.

An answer comes as a callback of Ray's: to wait for it costs the same however many actors there are.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any

from actors.pools.pool import Pool
from actors.pools.remote import ActorDied, Call, Remote, answer, late

QUEUE = 2
"""Calls that an actor is best given at a time: the second is there when it ends the first."""
CALLS_PER_S = 100
"""To all generators together: slices of very many are longer, since each call costs the coordinator CPU time."""
_CHECK_S = 1.0
"""Between two looks for calls that take too long."""


@dataclass(eq=False)
class Asked:
    """A call under way."""

    member: Member
    call: Call
    then: Callable[[Any], None]
    answered: bool = False
    result: Any = None


@dataclass(eq=False)
class Member:
    """One actor of a pool."""

    pool: Pool
    remote: Remote
    index: int
    """Its place among those of the pool, the last of whom leave first."""
    calls: deque[Asked] = field(default_factory=deque)
    """That it has still to answer, in their order."""
    held: dict[int, Any] = field(default_factory=dict)
    """Work that would be lost with it."""
    version: int = 0
    """Weights that it has been asked to load."""
    asked_at: float = 0.0
    free_at: float = 0.0
    """When it answered last."""

    @property
    def leaving(self) -> bool:
        """Whether it is to finish what it has and go."""
        return self.index >= self.pool.wanted


Answered = tuple[Asked, Future[Any]]


class Members:
    """The actors of some pools."""

    def __init__(self, pools: Sequence[Pool], died: Callable[[Member, ActorDied], None]) -> None:
        """`died` is told of an actor that died with calls to answer; it calls `lose`."""
        self.of = {pool: [Member(pool, actor, i) for i, actor in enumerate(pool.actors)] for pool in pools}
        self._died = died
        self._answered: SimpleQueue[Answered] = SimpleQueue()
        self._checked = time.monotonic()

    def add(self, pool: Pool, newcomers: Iterable[Remote]) -> list[Member]:
        """Those who have just joined the pool."""
        members = self.of[pool]
        new = [Member(pool, actor, i) for i, actor in enumerate(newcomers, len(members))]
        members += new
        return new

    def leave(self, pool: Pool) -> list[Member]:
        """Those beyond the pool's size who have nothing left to do, and are gone: from the last one on."""
        members, gone = self.of[pool], []
        while len(members) > pool.wanted and not members[-1].held and not members[-1].calls:
            gone.append(members.pop())
            pool.leave(gone[-1].remote)
        return gone

    def ask(
        self,
        member: Member,
        method: str,
        *args: Any,
        then: Callable[[Any], None] = lambda result: None,
        serialized: bool = False,
    ) -> None:
        """Queue a call; `hand_on` hands its result to `then`, after those of earlier calls."""
        remote = member.remote
        call = (remote.submit_serialized if serialized else remote.submit)(method, *args)
        asked = Asked(member, call, then)
        member.calls.append(asked)
        member.asked_at = call.started
        call.future().add_done_callback(lambda future: self._answered.put((asked, future)))

    def answers(self, timeout_s: float) -> list[Answered]:
        """The calls that were answered since the last time; waits up to `timeout_s` for the first one."""
        found = []
        try:
            found.append(self._answered.get(timeout_s > 0, timeout_s))
            while True:
                found.append(self._answered.get_nowait())
        except Empty:
            return found

    def hand_on(self, answers: Iterable[Answered]) -> dict[Member, None]:
        """Hand results on; returns whose queues have become shorter, in order.

        Raises:
            ActorFailure: a call raised, or one has not been answered in time; the message names the culprit.
        """
        changed: dict[Member, None] = {}
        for asked, future in answers:
            member = asked.member
            if asked not in member.calls:
                continue  # of an actor that has been given up
            try:
                asked.result = answer(asked.call, future)
            except ActorDied as death:
                changed.pop(member, None)
                self._died(member, death)
                continue
            changed[member] = None
            asked.answered = True
            while member.calls and member.calls[0].answered:
                self._in_order(member.calls.popleft())
        self._check_time()
        return changed

    def lose(self, member: Member, death: ActorDied) -> dict[int, Any]:
        """Go on without a dead one; returns the work that is lost."""
        member.pool.lose(member.remote, death)
        members = self.of[member.pool]
        members.remove(member)
        for index, other in enumerate(members):
            other.index = index
        lost, member.held, member.calls = member.held, {}, deque()
        return lost

    def _in_order(self, asked: Asked) -> None:
        member, now = asked.member, time.monotonic()
        member.pool.worked_for(member.remote, now - max(asked.call.started, member.free_at))
        member.free_at = now
        asked.then(asked.result)

    def _check_time(self) -> None:
        now = time.monotonic()
        if now - self._checked < _CHECK_S:
            return
        self._checked = now
        for member in (member for members in self.of.values() for member in members if member.calls):
            asked = member.calls[0]
            if now - max(asked.call.started, member.free_at) > member.pool.call_timeout_s:
                raise late(asked.call, member.pool.call_timeout_s)
