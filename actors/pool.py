"""A pool of like actors: started together, given work, replaced when one dies, grown and shrunk while it works."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from actors.remote import ActorDied, ActorFailure, Call, Remote, finished, late, wait

log = logging.getLogger(__name__)


class Pool:
    """`count` actors of one role, made by `spawn(name)`.

    An actor that died is replaced under a new name, brought up to date by `on_new(actor)` and given the lost work
    again; sampling is a function of the request's seed, so the work is the same.

    `scale` changes the size: newcomers start beside the work and join when they are ready, the last ones leave when
    they have nothing left to do. Both happen in `settle`, or where `Rollouts` keeps the actors at work.
    """

    def __init__(
        self,
        role: str,
        count: int,
        spawn: Callable[[str], Remote],
        *,
        start_timeout_s: float,
        call_timeout_s: float,
        on_new: Callable[[Remote], None] = lambda actor: None,
        max_replacements: int = 3,
    ) -> None:
        """`max_replacements`: between two calls of `worked`."""
        self.role, self.spawn, self.on_new = role, spawn, on_new
        self.start_timeout_s, self.call_timeout_s = start_timeout_s, call_timeout_s
        self.max_replacements, self.replacements = max_replacements, 0
        self._in_vain = 0
        self._names = (f"{role}-{i}" for i in itertools.count())
        self.wanted = count
        """How many there are to be: those beyond leave."""
        self.actors = [spawn(next(self._names)) for _ in range(count)]
        self._sizing = threading.Lock()
        self.joining: list[tuple[Remote, Call]] = []
        """Newcomers, with their calls of `ready`."""
        self.busy_s = [0.0] * count
        """Seconds that each place in the pool has worked, on calls of `map` and of `Rollouts`."""

    def __len__(self) -> int:
        return len(self.actors)

    def wait_until_ready(self) -> list[dict[str, Any]]:
        """Each actor's `ready()`; raises ActorFailure naming the one that is not up in `start_timeout_s`."""
        return wait([actor.submit("ready") for actor in self.actors], self.start_timeout_s)

    def broadcast(self, method: str, *args: Any) -> list[Any]:
        """Call `method(*args)` on every actor at the same time; results in the pool's order."""
        calls = [(i, actor.submit(method, *args)) for i, actor in enumerate(self.actors)]
        results = []
        for i, call in calls:
            try:
                results.extend(wait([call], self.call_timeout_s))
            except ActorDied as death:
                self._replace(i, death)
                results.append(self.actors[i].call(method, *args, timeout_s=self.call_timeout_s))
        return results

    def map(self, method: str, pieces: Sequence[Any], *args: Any) -> list[Any]:
        """`method(piece, *args)` for every piece, one piece at a time on each actor; results in the pieces' order."""
        results: list[Any] = [None] * len(pieces)
        waiting = list(reversed(range(len(pieces))))
        idle = list(reversed(range(len(self.actors))))
        running: dict[Call, tuple[int, int]] = {}
        while waiting or running:
            while waiting and idle:
                member, piece = idle.pop(), waiting.pop()
                running[self.actors[member].submit(method, pieces[piece], *args)] = (member, piece)
            done = finished(running, self.call_timeout_s)
            if not done:
                raise late(next(iter(running)), self.call_timeout_s)
            for call in done:
                member, piece = running.pop(call)
                try:
                    (results[piece],) = wait([call], self.call_timeout_s)
                    self.busy_s[member] += time.monotonic() - call.started
                except ActorDied as death:
                    self._replace(member, death)
                    waiting.append(piece)
                idle.append(member)
        return results

    def stop(self) -> None:
        for actor in [*self.actors, *(actor for actor, _ in self.joining)]:
            actor.kill()

    # ---- the size

    def scale(self, count: int) -> None:
        """Want `count` actors from now on. Returns at once; may be called from any thread."""
        with self._sizing:
            self.wanted = count
            while len(self.actors) + len(self.joining) < count:
                actor = self.spawn(next(self._names))
                self.joining.append((actor, actor.submit("ready")))
            while self.joining and len(self.actors) + len(self.joining) > count:
                self.joining.pop()[0].kill()

    def join(self) -> list[Remote]:
        """The newcomers that have become ready, now the pool's last; nobody has brought them up to date.

        One that does not start is given up with a warning: the others go on.
        """
        if not self.joining:
            return []
        joined = []
        with self._sizing:
            ready = finished([call for _, call in self.joining], 0)
            for actor, call in list(self.joining):
                try:
                    if call in ready:
                        wait([call], self.call_timeout_s)
                    elif time.monotonic() - call.started < self.start_timeout_s:
                        continue
                    else:
                        raise late(call, self.start_timeout_s)
                    joined.append(actor)
                except ActorFailure as failure:
                    log.warning("%s; the pool goes on with %d", failure, len(self.actors))
                    self.wanted -= 1
                    actor.kill()
                self.joining.remove((actor, call))
            self.actors += joined
            self.busy_s += [0.0] * len(joined)
        return joined

    def leave(self) -> None:
        """The last actor goes; it has no work."""
        self.actors.pop().kill()
        self.busy_s.pop()

    def settle(self) -> None:
        """Between two rounds of work: newcomers that are ready join, up to date, and those that are too many leave."""
        for actor in self.join():
            self.on_new(actor)
        while len(self.actors) > self.wanted:
            self.leave()

    # ---- deaths

    def worked(self) -> None:
        """A round of work is done: deaths before it do not count towards `max_replacements` any more."""
        self._in_vain = 0

    def respawn(self, index: int, death: ActorFailure) -> Remote:
        """A new actor in the place of a dead one, not ready yet; raises `death` when that happened too often."""
        if self._in_vain == self.max_replacements:
            raise death
        name = next(self._names)
        self.replacements += 1
        self._in_vain += 1
        log.warning("%s; %s takes its place", death, name)
        self.actors[index].kill()  # one that is only out of reach must not keep its resources
        self.actors[index] = self.spawn(name)
        return self.actors[index]

    def _replace(self, index: int, death: ActorFailure) -> None:
        actor = self.respawn(index, death)
        actor.call("ready", timeout_s=self.start_timeout_s)
        self.on_new(actor)
