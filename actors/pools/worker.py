"""One actor of a pool, and what it is doing."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from actors.pools.remote import Call, Remote

NO_VERSION = -1
"""The version of a worker that has been asked to load nothing yet."""


@dataclass(eq=False)
class QueuedCall:
    """A call in a worker's queue: it runs, waits for its turn, or its answer waits for that of an earlier call."""

    worker: Worker
    call: Call
    then: Callable[[Any], None]
    """Gets the result."""
    answered: bool = False
    result: Any = None


@dataclass(eq=False)
class Worker:
    """One actor of a pool.

    The life of a worker (`Pool` moves it, `Dispatcher` gives it work):

        spawned ─▶ Newcomer, not yet a worker ─▶ admitted ─▶ works ─▶ beyond `wanted`: finishes its work, dismissed
                       │ fails or is late                       └───▶ dies: lost, another Newcomer is spawned
                       └─▶ killed, and spawned again if it died
    """

    remote: Remote
    number: int
    """Rises with every worker that the pool admits: so `workers` stays sorted by it, whoever leaves."""
    calls: deque[QueuedCall] = field(default_factory=deque)
    """Calls without a delivered answer, oldest first."""
    held: dict[int, Any] = field(default_factory=dict)
    """Work that would be lost with the actor, by a key of the caller's."""
    version: int = NO_VERSION
    """Of the state that the actor was last asked to load."""
    busy_s: float = 0.0
    """Seconds that it has worked on calls of a dispatcher."""
    done: int = 0
    """Pieces of work that it has finished, see `finish`."""
    asked_at: float = 0.0
    """`time.monotonic()` of its newest call."""
    free_at: float = 0.0
    """`time.monotonic()` when its last answer was delivered."""

    @property
    def name(self) -> str:
        return self.remote.name

    @property
    def idle(self) -> bool:
        """Whether it has nothing left to do."""
        return not self.calls and not self.held

    def turn_began(self) -> float:
        """`time.monotonic()` when its oldest call had the actor for itself: calls run one after the other."""
        return max(self.calls[0].call.started, self.free_at)

    def add_busy(self, seconds: float) -> None:
        self.busy_s += seconds

    def finish(self, key: int) -> Any:
        """A piece of work that it held is done; returns what was held under `key`."""
        self.done += 1
        return self.held.pop(key)

    def drop_work(self) -> dict[int, Any]:
        """Forget queue and work; returns the work. Answers that still come find no call of theirs, and are ignored."""
        held, self.held, self.calls = self.held, {}, deque()
        return held
