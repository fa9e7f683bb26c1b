"""A pool of like actors: started together, given work, grown and shrunk while it works, whole again after deaths."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from actors.pools.remote import ActorDied, ActorFailure, Call, Remote, finished, late, wait

log = logging.getLogger(__name__)

_LOOK_S = 1.0
"""Between two looks at newcomers that the pool waits for."""


@dataclass(eq=False)
class Newcomer:
    """An actor that is on its way; it may have to wait for a node."""

    actor: Remote
    ready: Call
    overdue: bool = False


class Pool:
    """`count` actors of one role, made by `spawn(name)`.

    There is one way in: a newcomer starts beside the work, and joins when it is ready and `on_new(actor)` has brought
    it up to date. So it is when the pool grows (`scale`), and when an actor has died: its work goes to the others at
    once, or waits for the newcomer if there are none. Sampling is a function of the request's seed: the work is the
    same, whoever does it. When the pool shrinks, the last ones leave when they have nothing left to do.
    """

    def __init__(
        self,
        role: str,
        count: int,
        spawn: Callable[[str], Remote],
        *,
        start_timeout_s: float,
        call_timeout_s: float,
        node_timeout_s: float = 0.0,
        on_new: Callable[[Remote], None] = lambda actor: None,
        max_replacements: int = 3,
    ) -> None:
        """
        Args:
            node_timeout_s: how much longer a newcomer may take, for which the cluster may first have to grow.
            max_replacements: how often an actor and those that come in its place may die between two calls of `worked`
                without an error; with several actors each of the others may die once more, as they do with their node.
        """
        self.role, self.spawn, self.on_new = role, spawn, on_new
        self.start_timeout_s, self.call_timeout_s = start_timeout_s, call_timeout_s
        self.newcomer_timeout_s = start_timeout_s + node_timeout_s
        self.max_replacements = max_replacements
        self.deaths, self._deaths_of_round = 0, 0
        self._names = (f"{role}-{i}" for i in itertools.count())
        self.wanted = count
        """How many there are to be: those beyond leave."""
        self.actors = [spawn(next(self._names)) for _ in range(count)]
        self.joining: list[Newcomer] = []
        self._sizing = threading.Lock()
        self._busy_s: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self.actors)

    def wait_until_ready(self) -> list[dict[str, Any]]:
        """Each actor's `ready()`; raises ActorFailure naming the one that is not up in `start_timeout_s`."""
        return wait([actor.submit("ready") for actor in self.actors], self.start_timeout_s)

    def broadcast(self, method: str, *args: Any) -> list[Any]:
        """Call `method(*args)` on every actor at the same time; results in the pool's order, without those who died."""
        calls = [(actor, actor.submit(method, *args)) for actor in self.actors]
        results = []
        for actor, call in calls:
            try:
                results.extend(wait([call], self.call_timeout_s))
            except ActorDied as death:
                self.lose(actor, death)
        return results

    def map(self, method: str, pieces: Sequence[Any], *args: Any) -> list[Any]:
        """`method(piece, *args)` for every piece, one piece at a time on each actor; results in the pieces' order."""
        results: list[Any] = [None] * len(pieces)
        waiting = list(reversed(range(len(pieces))))
        idle = list(reversed(self.actors))
        running: dict[Call, tuple[Remote, int]] = {}
        while waiting or running:
            while waiting and idle:
                actor, piece = idle.pop(), waiting.pop()
                running[actor.submit(method, pieces[piece], *args)] = (actor, piece)
            if not running:
                idle += self._await_newcomers()
                continue
            done = finished([*running, *(newcomer.ready for newcomer in self.joining)], self.call_timeout_s)
            if not done:
                raise late(next(iter(running)), self.call_timeout_s)
            idle += self.welcome()
            for call in [call for call in done if call in running]:
                actor, piece = running.pop(call)
                try:
                    (results[piece],) = wait([call], self.call_timeout_s)
                except ActorDied as death:
                    self.lose(actor, death)
                    waiting.append(piece)
                else:
                    self.worked_for(actor, time.monotonic() - call.started)
                    idle.append(actor)
        return results

    def stop(self) -> None:
        for actor in [*self.actors, *(newcomer.actor for newcomer in self.joining)]:
            actor.kill()

    # ---- the size

    def scale(self, count: int) -> None:
        """Want `count` actors from now on. Returns at once; may be called from any thread."""
        with self._sizing:
            self.wanted = count
            self._fill()
            while self.joining and len(self.actors) + len(self.joining) > count:
                superfluous = next((newcomer for newcomer in self.joining if newcomer.overdue), self.joining[-1])
                self.joining.remove(superfluous)
                superfluous.actor.kill()

    @property
    def steady(self) -> bool:
        """Whether the size is what it will be for a while: nobody is to leave, and nobody is expected any moment."""
        with self._sizing:
            return len(self.actors) <= self.wanted and all(newcomer.overdue for newcomer in self.joining)

    def join(self) -> list[Remote]:
        """The newcomers that have become ready, now the pool's last; nobody has brought them up to date.

        The others go on without one that is late, and without one that fails to start: if it died, for instance with
        its node, there is another try.

        Raises:
            ActorFailure: there are no others.
        """
        if not self.joining and len(self.actors) >= self.wanted:
            return []
        joined = []
        with self._sizing:
            self._fill()  # more were wanted while the last one left, or the last newcomer failed and this is a new run
            ready = finished([newcomer.ready for newcomer in self.joining], 0)
            for newcomer in list(self.joining):
                if newcomer.ready in ready:
                    self.joining.remove(newcomer)
                    try:
                        wait([newcomer.ready], self.call_timeout_s)
                    except ActorFailure as failure:
                        newcomer.actor.kill()
                        self._without(failure)
                    else:
                        self.actors = [*self.actors, newcomer.actor]
                        joined.append(newcomer.actor)
                elif time.monotonic() - newcomer.ready.started > self.newcomer_timeout_s:
                    self._mark_overdue(newcomer)
            if not self.actors and all(newcomer.overdue for newcomer in self.joining):
                raise late(self.joining[-1].ready, self.newcomer_timeout_s)
        return joined

    def _mark_overdue(self, newcomer: Newcomer) -> None:
        if not newcomer.overdue and self.actors:
            log.warning(
                "%s is not up after %.0f s and is waited for; perhaps no node has room for it, see `ray status`; %s",
                newcomer.actor.name, self.newcomer_timeout_s, self._on_their_way,
            )  # fmt: skip
        newcomer.overdue = True

    def _without(self, failure: ActorFailure) -> None:
        """A newcomer failed: another try if it died, else the others go on, if there are any."""
        if not (isinstance(failure, ActorDied) and self._may_go_on()):
            if not self.actors and not self.joining:
                raise failure
            self.wanted -= 1
        self._fill()
        log.warning("%s; %s", failure, self._on_their_way)

    def leave(self, actor: Remote) -> None:
        """It has no work and goes."""
        with self._sizing:
            self._remove(actor)
        actor.kill()

    def settle(self) -> None:
        """Between two rounds of work: newcomers that are ready join, and those that are too many leave.

        Afterwards there is somebody.
        """
        self.welcome()
        if not self.actors:
            self._await_newcomers()
        while len(self.actors) > self.wanted:
            self.leave(self.actors[-1])

    def welcome(self) -> list[Remote]:
        """The newcomers that have become ready, brought up to date."""
        welcome = []
        for actor in self.join():
            try:
                self.on_new(actor)
                welcome.append(actor)
            except ActorFailure as failure:
                actor.kill()
                with self._sizing:
                    self._remove(actor)
                    self._without(failure)
        return welcome

    def _await_newcomers(self) -> list[Remote]:
        while not (welcome := self.welcome()):
            finished([newcomer.ready for newcomer in self.joining], _LOOK_S)
        return welcome

    def _fill(self) -> None:
        while len(self.actors) + len(self.joining) < self.wanted:
            actor = self.spawn(next(self._names))
            self.joining.append(Newcomer(actor, actor.submit("ready")))

    def _remove(self, actor: Remote) -> None:
        self.actors = [other for other in self.actors if other is not actor]
        self._busy_s.pop(actor.name, None)

    # ---- work and deaths

    def worked_for(self, actor: Remote, seconds: float) -> None:
        self._busy_s[actor.name] = self._busy_s.get(actor.name, 0.0) + seconds

    def busy_s(self) -> dict[str, float]:
        """Seconds that each actor has worked, on calls of `map` and of `Members`; by name, in the pool's order."""
        return {actor.name: self._busy_s.get(actor.name, 0.0) for actor in self.actors}

    def worked(self) -> None:
        """A round of work is done: deaths before it do not count towards `max_replacements` any more."""
        self._deaths_of_round = 0

    def lose(self, actor: Remote, death: ActorFailure) -> None:
        """Go on without a dead actor; a newcomer is on its way. Raises `death` when that happened too often."""
        with self._sizing:
            if actor not in self.actors:
                return  # known already
            self._remove(actor)
            actor.kill()  # one that is only out of reach must not keep its resources
            if not self._may_go_on():
                raise death
            self._fill()
            log.warning("%s; %s", death, self._on_their_way)

    def _may_go_on(self) -> bool:
        """Count a death; whether it is one that another actor may make up for."""
        self.deaths += 1
        self._deaths_of_round += 1
        return self._deaths_of_round < self.wanted + self.max_replacements

    @property
    def _on_their_way(self) -> str:
        names = ", ".join(newcomer.actor.name for newcomer in self.joining)
        return f"{len(self)} {self.role}s go on (wanted: {self.wanted}), on their way: {names or 'nobody'}"
