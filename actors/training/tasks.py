"""What Ray Train's workers are to do next, and what became of it: the actor between the driver and the workers.

    driver                     Tasks                      every worker
    give(1, sft loop)   ──▶    task 1
                                          ◀──  next(0) waits, and gets task 1
    outcome(1) waits    ──▶               ◀──  finish(1, rank 0, no error)   trains
    gets the outcome    ◀──               ◀──  finish(1, rank 1, no error)
    ...                                   ◀──  next(1) waits for hours if need be
    give(2, RL loop)    ──▶    task 2  ──▶     gets task 2

Ray Train starts the workers once for all stages. When it has to start them again, because one died, the new ones ask
for what comes after the last task that was finished: they get the same task again, whose loop continues from its newest
checkpoint.

Failures come here, too, from the worker that raised (`failed`), from Ray Train's controller (`group_failed`), since Ray
Train's own report of them is cut in the middle, and from the driver, which kills ranks that give no sign of life
(`rank_silent`). The driver reads them as `news`.
"""

from __future__ import annotations

import asyncio
import enum
from typing import Any, NamedTuple

from rayrlhf.failures import of_another, with_remedy

# Nothing heavy is imported here: the actor's process would import it as well.

TRAIN_ENVIRONMENT = {
    # Ray Train polls its workers every 2 s, and would notice a death only then.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "60",
    # An actor that tells workers of nodes that are about to be taken away. Nothing here listens to it, and it costs
    # 8 s of CPU time to start, since each of Ray Train's actors imports all of Ray Train.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_V2_ENABLED": "1",
}
"""Ray Train's settings, which it reads when it is first imported."""


class Failed(NamedTuple):
    """What went wrong on a rank."""

    cause: str
    """One line, without a remedy."""
    place: str | None = None
    """Stage and step, if they are known."""
    traceback: str = ""
    """The whole of it."""

    def told(self) -> str:
        return (f"{self.place}: " if self.place else "") + with_remedy(self.cause)


class Outcome(NamedTuple):
    """How a task ended, if a worker lives to tell it."""

    user_error: str | None = None
    """What the user has to mend."""
    not_finite: str | None = None
    """Which number was not finite."""
    failed: Failed | None = None
    """What a new start of the workers would only meet again."""


class GroupEnd(enum.Enum):
    """What Ray Train does about a worker group that has failed."""

    RESTARTS = "restarts"
    """It starts the workers again, at the price of one of `max_failures`."""
    TRIES_AGAIN = "tries again"
    """The workers could not start, and have another try."""
    FINAL = "final"
    """It gives up."""


class News(NamedTuple):
    """What has become of the worker group."""

    text: str
    """One line."""
    traceback: str
    final: bool
    """Whether Ray Train has given up."""


class BeatingRank(NamedTuple):
    """A rank that gives signs of life."""

    number: int
    key: str
    """Of its beats, see `actors.pools.beats`: another one after every start."""


class Given(NamedTuple):
    """The answer to a worker that asks for work."""

    number: int = 0
    task: tuple[Any, ...] = ()
    """One ObjectRef of (loop, arguments). In a tuple, so that Ray passes it on without fetching what it stands for."""


class StopRequest:
    """Whether the loop that is under way is to save and end before its last step. The driver says so, the loop asks."""

    def __init__(self) -> None:
        self._stop = False

    def request_stop(self) -> None:
        self._stop = True

    def stop_requested(self) -> bool:
        return self._stop


class Tasks(StopRequest):
    """An asynchronous actor: any number of calls wait inside it at the same time."""

    def __init__(self, workers: int, max_failures: int) -> None:
        """`max_failures`: how often Ray Train may start the workers again."""
        super().__init__()
        self._workers, self._left = workers, max_failures
        self._allowed = max_failures
        self._failed: list[Failed] = []
        """What the workers of this group have raised, in order."""
        self._earlier: Failed | None = None
        """What the group before this one failed with."""
        self._beating: dict[int, BeatingRank] = {}
        self._silent: list[Failed] = []
        """Why ranks of this group are killed."""
        self._news: list[News] = []
        self._current = Given()
        self._outcomes: dict[int, Outcome] = {}
        self._done: set[int] = set()
        """Ranks that are done with the current task."""
        self._changed = asyncio.Condition()
        self._controller: list[Any] = []

    # ---- called by the driver

    async def give(self, number: int, task: tuple[Any, ...]) -> None:
        """The next task; numbers rise by one."""
        self._done.clear()
        async with self._changed:
            self._current = Given(number, task)
            self._changed.notify_all()

    async def outcome(self, number: int, wait_s: float) -> Outcome | None:
        """What became of the task; None if it is still under way after `wait_s`."""
        await self._wait(lambda: number in self._outcomes, wait_s)
        return self._outcomes.get(number)

    async def news(self, after: int) -> list[News]:
        """What has happened since the first `after` news."""
        return self._news[after:]

    async def controller(self) -> Any:
        """Ray Train's controller, once it is up."""
        return self._controller[0] if self._controller else None

    async def beating(self) -> list[BeatingRank]:
        """The ranks of this group that give signs of life, or should."""
        return [*self._beating.values()]

    async def rank_silent(self, rank: BeatingRank, failed: Failed) -> None:
        """A rank gives no sign of life, and will be killed for it: that is why its group will fail."""
        if rank in self._beating.values():  # the group may have failed meanwhile, with something else
            self._silent.append(failed)

    # ---- called by Ray Train's processes

    async def rank_beats(self, rank: BeatingRank) -> None:
        """A rank that has just started will give signs of life."""
        self._beating[rank.number] = rank

    async def set_controller(self, controller: list[Any]) -> None:
        self._controller = controller

    async def next(self, after: int, wait_s: float) -> Given:
        """The task that follows number `after`; nothing yet, if there is none within `wait_s`."""
        await self._wait(lambda: self._current.number > after, wait_s)
        return self._current if self._current.number > after else Given()

    async def finish(self, number: int, rank: int, outcome: Outcome) -> None:
        """Say what became of a task on a rank. The task has ended once all ranks are done, or one met an error."""
        async with self._changed:
            self._done.add(rank)
            if outcome != Outcome() or len(self._done) == self._workers:
                self._outcomes.setdefault(number, outcome)
                self._changed.notify_all()

    async def failed(self, failed: Failed) -> bool:
        """A worker has raised. Returns whether the group before this one has failed with the same, at the same step.

        What is only the end of another worker, as its neighbours see it, never counts as the same.
        """
        self._failed.append(failed)
        before = self._earlier
        same = before is not None and (before.place, before.cause) == (failed.place, failed.cause)
        return same and not of_another(failed.cause)

    async def group_failed(self, seen: Failed, dead: bool, end: GroupEnd) -> None:
        """Ray Train's controller has seen the group fail.

        Args:
            seen: what it knows of it.
            dead: a worker's process is gone, which explains what the others have raised.
            end: what it does about it.
        """
        own = [failed for failed in self._failed if not of_another(failed.cause)] or self._failed
        found = self._silent[0] if self._silent else seen if dead or not own else own[0]
        whole = "\n".join(failed.traceback for failed in (*self._silent, seen, *self._failed))
        self._earlier, self._failed, self._silent = found, [], []
        self._beating.clear()
        self._left -= end is GroupEnd.RESTARTS
        left = f"{self._left} of {self._allowed} restarts left"
        then = {
            GroupEnd.RESTARTS: f"; the learner goes on from its last checkpoint, {left}",
            GroupEnd.TRIES_AGAIN: "; they have another try",
            GroupEnd.FINAL: self._used_up(),
        }[end]
        self._news.append(News(f"{found.told()}{then}", whole, end is GroupEnd.FINAL))

    def _used_up(self) -> str:
        if self._left > 0:  # Ray Train takes it for nothing that a restart could help
            return ""
        spent = {0: "no restart is allowed", 1: "its one restart is used up"}
        said = spent.get(self._allowed, f"its {self._allowed} restarts are used up")
        return f"; {said} (resources.learner.max_failures={self._allowed})"

    async def begin(self) -> int:
        """Rank 0 of a worker group that has just started asks for the last task that has ended; 0 before the first.

        What the ranks of an earlier group had done does not count.
        """
        self._done.clear()
        return max(self._outcomes, default=0)

    async def _wait(self, happened: Any, wait_s: float) -> None:
        async with self._changed:
            try:
                await asyncio.wait_for(self._changed.wait_for(happened), wait_s)
            except TimeoutError:
                pass
