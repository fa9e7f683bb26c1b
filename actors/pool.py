"""A pool of like actors: started together, given work, replaced when one dies."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from actors.remote import ActorDied, ActorFailure, Call, Remote, finished, late, wait

log = logging.getLogger(__name__)


class Pool:
    """`count` actors of one role, made by `spawn(name)`.

    An actor that died is replaced under a new name, brought up to date by `on_replaced(actor)` and given the lost
    work again; sampling is a function of the request's seed, so the work is the same.
    """

    def __init__(
        self,
        role: str,
        count: int,
        spawn: Callable[[str], Remote],
        *,
        start_timeout_s: float,
        call_timeout_s: float,
        on_replaced: Callable[[Remote], None] = lambda actor: None,
        max_replacements: int = 3,
    ) -> None:
        self.role, self.spawn, self.on_replaced = role, spawn, on_replaced
        self.start_timeout_s, self.call_timeout_s = start_timeout_s, call_timeout_s
        self.max_replacements, self.replacements = max_replacements, 0
        self.actors = [spawn(f"{role}-{i}") for i in range(count)]
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
        for actor in self.actors:
            actor.kill()

    def respawn(self, index: int, death: ActorFailure) -> Remote:
        """A new actor in the place of a dead one, not ready yet; raises `death` when that happened too often."""
        if self.replacements == self.max_replacements:
            raise death
        name = f"{self.role}-{len(self.actors) + self.replacements}"
        self.replacements += 1
        log.warning("%s; %s takes its place", death, name)
        self.actors[index].kill()  # one that is only out of reach must not keep its resources
        self.actors[index] = self.spawn(name)
        return self.actors[index]

    def _replace(self, index: int, death: ActorFailure) -> None:
        actor = self.respawn(index, death)
        actor.call("ready", timeout_s=self.start_timeout_s)
        self.on_replaced(actor)
