"""A pool of like workers: started together, grown and shrunk while they work, made whole again after deaths."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future
from concurrent.futures import wait as wait_for_futures
from dataclasses import dataclass
from typing import Any

from actors.pools.announcing import WHOLE
from actors.pools.autopsy import examine_and_end
from actors.pools.heartbeat import Heartbeat
from actors.pools.remote import (
    ActorDied,
    ActorFailure,
    ActorLate,
    ActorWedged,
    Call,
    CouldNotStart,
    Remote,
    answer,
    late,
    wait,
)
from actors.pools.stragglers import Stragglers
from actors.pools.worker import Worker
from rayrlhf.failures import lasting

log = logging.getLogger(__name__)

LOOK_S = 1.0
"""Between two looks for newcomers while no answer comes."""


@dataclass(eq=False)
class Newcomer:
    """An actor that starts. It may have to wait for a node."""

    actor: Remote
    ready: Call
    answer: Future[Any]
    """Of `ready`."""
    overdue: bool = False
    """Whether the pool has said that it goes on without it for now."""


class Pool:
    """`count` workers of one role, whose actors are made by `spawn(name)`.

    A new actor starts in the background and joins once it is ready and `on_new` has updated it. This holds for growth
    and for replacing a dead worker, whose work the others take over. When the pool shrinks, its last workers finish
    what they have and leave.

    One thread uses the pool; `scale` and every attribute may also be used from others. Example, with `wanted` 2:

        workers 0 1                             both work
        workers 0 1, joining 2                  scale(3): the newcomer starts, the others go on
        workers 0 1 2                           admit(): it is ready
        workers 0 2, joining 3                  worker 1 died: lose() starts another one
        workers 0 2 3                           admit()
        workers 0 2                             scale(2): worker 3 is the last; dismiss_idle() once it is done
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
        heartbeat_timeout_s: float | None = None,
        on_new: Callable[[Worker], None] = lambda worker: None,
        max_replacements: int = 3,
    ) -> None:
        """Start `count` actors; `wait_until_ready` waits for them.

        Args:
            role: what the workers are called: `role`-0, `role`-1 and so on; no name is given twice.
            start_timeout_s: how long an actor may take until it is ready, in seconds.
            call_timeout_s: how long one call may take, in seconds.
            node_timeout_s: how much longer a newcomer may take, for which the cluster may first have to grow.
            heartbeat_timeout_s: a worker that gives no sign of life for so many seconds is killed and replaced; None:
                only the length of its calls is looked at. Its actor has to be a `SerializedCalls`.
            on_new: brings a newcomer up to date. An `ActorFailure` that it raises gives the newcomer up.
            max_replacements: the run fails at death number `wanted + max_replacements` since the last `reset_deaths`:
                all may die at once, as they do with their node, and some of their replacements.
        """
        self.role, self.spawn, self.on_new = role, spawn, on_new
        self.start_timeout_s, self.call_timeout_s = start_timeout_s, call_timeout_s
        self.newcomer_timeout_s = start_timeout_s + node_timeout_s
        self.max_replacements = max_replacements
        self.deaths, self._deaths_of_round = 0, 0
        self._silent_in_round = False
        """Whether a worker that answered nothing was killed in this round."""
        self._no_start = ""
        """Why the last newcomer could not start."""
        self.heartbeat, self._stragglers = Heartbeat(heartbeat_timeout_s), Stragglers()
        self._names = (f"{role}-{i}" for i in itertools.count())
        self._numbers = itertools.count()
        self.wanted = count
        """How many workers there should be; those beyond it leave."""
        # Replaced as a whole at every change, so that other threads can go through it.
        self.workers = [Worker(spawn(next(self._names)), next(self._numbers)) for _ in range(count)]
        self.joining: list[Newcomer] = []
        self._sizing = threading.Lock()

    def __len__(self) -> int:
        return len(self.workers)

    def wait_until_ready(self) -> list[dict[str, Any]]:
        """Each worker's `ready()`; raises ActorFailure naming the one that is not up in `start_timeout_s`."""
        ready: list[dict[str, Any]] = wait([w.remote.submit("ready") for w in self.workers], self.start_timeout_s)
        for worker in self.workers:
            self.heartbeat.begin(worker)
        return ready

    def broadcast(self, method: str, *args: Any) -> list[Any]:
        """Call `method(*args)` on every worker at the same time.

        Returns:
            The results in the order of `workers` as it is afterwards: workers that died are left out of both, and so
            is one that did not answer in time.

        Raises:
            ActorFailure: a call raised, or what `lose` raises.
        """
        calls = [(worker, worker.remote.submit(method, *args)) for worker in self.workers]
        results = []
        for worker, call in calls:
            try:
                results.append(self._answer(worker, call))
            except (ActorDied, ActorLate) as failure:
                self.lose(worker, failure)
        return results

    def ask(self, worker: Worker, method: str, *args: Any) -> Any:
        """Call `method(*args)` on one worker, and wait for the result.

        Raises:
            ActorFailure: it raised, died, was late, or gave no sign of life; nothing is done about it.
        """
        return self._answer(worker, worker.remote.submit(method, *args))

    def _answer(self, worker: Worker, call: Call) -> Any:
        future, deadline = call.future(), time.monotonic() + self.call_timeout_s
        while not future.done():
            if worker in self.heartbeat.look():
                raise self.heartbeat.wedged(worker)
            left = deadline - time.monotonic()
            if left <= 0:
                raise self.heartbeat.overdue(worker, call, self.call_timeout_s)
            wait_for_futures([future], min(LOOK_S, left))
        return answer(call, future)

    def report_stragglers(self) -> None:
        """Warn once of each worker that is much slower than the others."""
        for line in self._stragglers.look(self.workers, time.monotonic()):
            log.warning("%s", line)

    @property
    def stragglers(self) -> list[Worker]:
        """The workers that were much slower than the others when `report_stragglers` looked last."""
        return [worker for worker in self.workers if worker in self._stragglers.slow]

    def stop(self) -> None:
        """Kill all actors."""
        for worker in self.workers:
            self.heartbeat.forget(worker)
        for actor in [*(worker.remote for worker in self.workers), *(newcomer.actor for newcomer in self.joining)]:
            actor.kill()

    def busy_s(self) -> dict[str, float]:
        """Seconds that each worker has worked on calls of a dispatcher, by name."""
        return {worker.name: worker.busy_s for worker in self.workers}

    # ---- growing and shrinking

    def scale(self, count: int) -> None:
        """Want `count` workers from now on. Returns at once; may be called from any thread."""
        with self._sizing:
            self.wanted = count
            self._spawn_missing()
            while self.joining and len(self.workers) + len(self.joining) > count:
                superfluous = next((newcomer for newcomer in self.joining if newcomer.overdue), self.joining[-1])
                self.joining.remove(superfluous)
                superfluous.actor.kill()

    @property
    def leaving(self) -> list[Worker]:
        """The workers beyond the wanted size: they get no new work."""
        return self.workers[self.wanted :]

    @property
    def steady(self) -> bool:
        """Whether the size will stay for a while: no worker is to leave, and no newcomer is expected any moment."""
        with self._sizing:
            return len(self.workers) <= self.wanted and all(newcomer.overdue for newcomer in self.joining)

    def apply_size(self) -> None:
        """Between two rounds of work: admit newcomers, dismiss workers beyond the wanted size.

        Returns only when at least one worker is available.
        """
        self.admit()
        if not self.workers:
            self.admit_first()
        self.dismiss_idle()

    def admit(self) -> list[Worker]:
        """Admit the newcomers that are ready, and bring each up to date; returns those that joined.

        Raises:
            ActorFailure: no worker is left, and the newcomers failed or are late.
        """
        admitted = []
        for worker in self.admit_ready():
            try:
                self.on_new(worker)
                admitted.append(worker)
            except ActorFailure as failure:
                self._end(worker, failure)
                with self._sizing:
                    self._remove(worker)
                    self._newcomer_failed(failure)
        return admitted

    def admit_first(self) -> None:
        """Wait until the first newcomer has joined; raises what `admit` raises."""
        while not self.admit():
            wait_for_futures([newcomer.answer for newcomer in self.joining], LOOK_S, FIRST_COMPLETED)

    def admit_ready(self) -> list[Worker]:
        """Admit the newcomers that are ready, as they are: the caller brings them up to date.

        The others go on without a newcomer that is late, and without one that fails to start. If that one died, for
        instance with its node, there is another try.

        Raises:
            ActorFailure: no worker is left, and the newcomers failed or are late.
        """
        if not self.joining and len(self.workers) >= self.wanted:
            return []  # nearly always: this is asked between any two slices of work
        admitted = []
        with self._sizing:
            # Some may be missing though nobody died just now: more became wanted while the last one left.
            self._spawn_missing()
            for newcomer in list(self.joining):
                if newcomer.answer.done():
                    self.joining.remove(newcomer)
                    try:
                        answer(newcomer.ready, newcomer.answer)
                    except ActorFailure as failure:
                        newcomer.actor.kill()
                        self._newcomer_failed(failure)
                    else:
                        admitted.append(Worker(newcomer.actor, next(self._numbers)))
                        self.heartbeat.begin(admitted[-1])
                        self.workers = [*self.workers, admitted[-1]]
                elif time.monotonic() - newcomer.ready.started > self.newcomer_timeout_s:
                    self._mark_overdue(newcomer)
            if not self.workers and all(newcomer.overdue for newcomer in self.joining):
                raise late(self.joining[-1].ready, self.newcomer_timeout_s)
        return admitted

    def dismiss_idle(self) -> list[Worker]:
        """Dismiss workers beyond the wanted size that have nothing left to do, from the last one on; returns them."""
        dismissed = []
        while len(self.workers) > self.wanted and self.workers[-1].idle:
            dismissed.append(self.workers[-1])
            self.dismiss(dismissed[-1])
        return dismissed

    def dismiss(self, worker: Worker) -> None:
        """End a worker that has no work."""
        self.heartbeat.forget(worker)
        with self._sizing:
            self._remove(worker)
        worker.remote.kill()

    # ---- deaths

    def reset_deaths(self) -> None:
        """A round of work is done: earlier deaths do not count towards `max_replacements` any more."""
        self._deaths_of_round, self._silent_in_round, self._no_start = 0, False, ""

    def lose(self, worker: Worker, failure: ActorFailure) -> None:
        """Go on without a worker; a newcomer starts in its place. Its work is the caller's, see `Dispatcher.lose`.

        Args:
            failure: an `ActorDied`, or that it did not answer in time: then it is killed, and counts as dead. What one
                that hangs is at goes into the log, or into a note of the error.

        Raises:
            ActorFailure: `failure`, when too many died; also when it is the second one of a round that did not answer.
                One actor may hang, but if two do not answer, the time-out is too short for the work.
        """
        silent = not isinstance(failure, ActorDied)
        with self._sizing:
            if worker not in self.workers:
                return  # its death is known already
            if silent and self._silent_in_round:
                raise failure
            self._silent_in_round |= silent
            self._remove(worker)
        whole = self._end(worker, failure)  # also one that is only out of reach: it must not keep its resources
        if whole:
            failure.add_note(whole)
        with self._sizing:
            if not self._count_death():
                raise failure
            self._spawn_missing()
            killed = ": it is killed as if it had died" if silent else ""
            log.warning("%s%s; %s; %s", failure, killed, self._outlook, self._allowance, extra={WHOLE: whole})

    def _end(self, worker: Worker, failure: ActorFailure) -> str:
        """End a worker's actor; returns what it was at, if it hung."""
        beat = self.heartbeat.forget(worker)
        dead = isinstance(failure, ActorDied) and not isinstance(failure, ActorWedged)
        whole = "" if dead or beat is None else examine_and_end(beat)
        worker.remote.kill()
        return whole

    # ---- with `_sizing` held

    def _spawn_missing(self) -> None:
        while len(self.workers) + len(self.joining) < self.wanted:
            actor = self.spawn(next(self._names))
            ready = actor.submit("ready")
            self.joining.append(Newcomer(actor, ready, ready.future()))

    def _remove(self, worker: Worker) -> None:
        self.workers = [other for other in self.workers if other is not worker]

    def _newcomer_failed(self, failure: ActorFailure) -> None:
        """Try again if the newcomer died. Otherwise the others go on without it, if there are any.

        One that could not start is followed by another one, unless that meets the same for sure, or has met it.
        """
        why, before = "", self._no_start
        if isinstance(failure, CouldNotStart):
            why = self._no_start = str(failure).removeprefix(str(failure).split(" ", 1)[0])  # without its name
        hopeless = why != "" and (why == before or lasting(why))
        if hopeless or not (isinstance(failure, ActorDied) and self._count_death()):
            if not self.workers and not self.joining:
                raise failure
            self.wanted -= 1
        self._spawn_missing()
        log.warning("%s; %s; %s", failure, self._outlook, self._allowance)

    def _count_death(self) -> bool:
        """Count a death; returns whether another actor may make up for it."""
        self.deaths += 1
        self._deaths_of_round += 1
        return self._deaths_of_round < self.wanted + self.max_replacements

    def _mark_overdue(self, newcomer: Newcomer) -> None:
        if not newcomer.overdue and self.workers:
            log.warning(
                "%s is not up after %.0f s and is waited for; perhaps no node has room for it, see `ray status`; %s",
                newcomer.actor.name, self.newcomer_timeout_s, self._outlook,
            )  # fmt: skip
        newcomer.overdue = True

    @property
    def _allowance(self) -> str:
        allowed = self.wanted + self.max_replacements - 1
        return f"{max(0, allowed - self._deaths_of_round)} of {allowed} replacements left"

    @property
    def _outlook(self) -> str:
        names = ", ".join(newcomer.actor.name for newcomer in self.joining)
        return f"{len(self)} {self.role}s go on (wanted: {self.wanted}), on their way: {names or 'nobody'}"
