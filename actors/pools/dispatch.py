"""The one dispatcher of calls: each worker has a queue, and the answers of all workers are awaited together.

    submit ─▶ worker.calls ─▶ the actor ─▶ poll ─▶ deliver ─▶ then(result)

An answer comes as a callback of Ray's: to wait for it costs the same however many actors there are.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from functools import partial
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any

from actors.pools.pool import LOOK_S, Pool
from actors.pools.remote import ActorDied, ActorFailure, answer
from actors.pools.worker import QueuedCall, Worker

QUEUE = 2
"""Calls in flight per actor. With two, an actor never idles while its answer travels."""
CALLS_PER_S = 100
"""Calls that all actors of a pool together should cause at most: each costs the caller CPU time."""
_CHECK_S = 1.0
"""Between two looks for calls that take too long."""

Answered = tuple[QueuedCall, Future[Any]]


class Dispatcher:
    """Sends calls to the workers of some pools and delivers their answers, for one job.

    A worker's queue belongs to one dispatcher at a time. Leaving the `with` block forgets what is under way:

        with Dispatcher([pool], on_loss=give_to_others) as dispatcher:
            dispatcher.submit(pool.workers[0], "add", 1, then=print)
            while dispatcher.busy:
                dispatcher.deliver(dispatcher.poll(1.0))
    """

    def __init__(self, pools: Sequence[Pool], on_loss: Callable[[Worker, dict[int, Any]], None]) -> None:
        """`on_loss(worker, held)`: the worker died; `held` is the work that it had."""
        self._pools, self._on_loss = pools, on_loss
        self._answered: SimpleQueue[Answered] = SimpleQueue()
        self._checked = time.monotonic()

    def __enter__(self) -> Dispatcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Forget what is under way: the workers are free for another dispatcher."""
        for pool in self._pools:
            for worker in pool.workers:
                worker.drop_work()

    @property
    def busy(self) -> bool:
        """Whether an answer is still to be delivered."""
        return any(worker.calls for pool in self._pools for worker in pool.workers)

    def submit(
        self,
        worker: Worker,
        method: str,
        *args: Any,
        then: Callable[[Any], None] = lambda result: None,
        serialized: bool = False,
    ) -> None:
        """Queue a call; `deliver` passes its result to `then`, after those of the worker's earlier calls.

        Args:
            serialized: call by one string of bytes, see `SerializedCalls`; `args` then hold no ObjectRef.
        """
        remote = worker.remote
        call = (remote.submit_serialized if serialized else remote.submit)(method, *args)
        queued = QueuedCall(worker, call, then)
        worker.calls.append(queued)
        worker.asked_at = call.started
        # The callback runs in a thread of Ray's: it only hands the future over.
        call.future().add_done_callback(lambda future: self._answered.put((queued, future)))

    def poll(self, timeout_s: float) -> list[Answered]:
        """The calls that were answered since the last poll; waits up to `timeout_s` for the first one."""
        found = []
        try:
            found.append(self._answered.get(timeout_s > 0, timeout_s))
            while True:
                found.append(self._answered.get_nowait())
        except Empty:
            return found

    def deliver(self, answers: Iterable[Answered]) -> list[Worker]:
        """Pass results on, each worker's in the order of its calls; a dead worker's work goes to `on_loss`.

        Returns:
            The living workers that answered, each once, in the order of their first answers.

        Raises:
            ActorFailure: a call raised, too many workers died, or a second one in this round did not answer in time
                (the first one is killed and replaced as if it had died, as is each that hangs); it names the culprit.
            UserError: raised by the actor itself.
        """
        changed: dict[Worker, None] = {}
        for queued, future in answers:
            worker = queued.worker
            if queued not in worker.calls:
                continue  # the worker is dead, or the call is of a former dispatcher's
            try:
                queued.result = answer(queued.call, future)
            except ActorDied as death:
                changed.pop(worker, None)
                self.lose(worker, death)
                continue
            changed[worker] = None
            queued.answered = True
            # Callbacks of two calls may come in the wrong order, even of one actor: a later answer waits here.
            while worker.calls and worker.calls[0].answered:
                self._deliver_oldest(worker)
        self._check_time()
        return list(changed)

    def lose(self, worker: Worker, failure: ActorFailure) -> None:
        """Go on without a worker; its work goes to `on_loss`. Raises what `Pool.lose` raises."""
        for pool in self._pools:
            if worker in pool.workers:
                pool.lose(worker, failure)
        # Also where a broadcast has found the death before: it knows nothing of this work.
        self._on_loss(worker, worker.drop_work())

    def _deliver_oldest(self, worker: Worker) -> None:
        now = time.monotonic()
        worker.add_busy(now - worker.turn_began())
        worker.free_at = now
        oldest = worker.calls.popleft()
        oldest.then(oldest.result)

    def _check_time(self) -> None:
        now = time.monotonic()
        if now - self._checked < _CHECK_S:
            return
        self._checked = now
        for pool in self._pools:
            for worker in pool.heartbeat.look():
                self.lose(worker, pool.heartbeat.wedged(worker))
            for worker in pool.workers:
                if worker.calls and now - worker.turn_began() > pool.call_timeout_s:
                    overdue = pool.heartbeat.overdue(worker, worker.calls[0].call, pool.call_timeout_s)
                    self.lose(worker, overdue)
            pool.report_stragglers()


def map_pieces(pool: Pool, method: str, pieces: Sequence[Any], *args: Any) -> list[Any]:
    """Call `method(piece, *args)` for every piece, one piece at a time on each worker.

    Pieces go out in their order, first to the pool's first worker. The piece of a worker that died goes to another.

    Returns:
        The results, in the order of the pieces.

    Raises:
        ActorFailure, UserError: see `Dispatcher.deliver`.
    """
    results: list[Any] = [None] * len(pieces)
    waiting = deque(range(len(pieces)))

    def keep(worker: Worker, piece: int, result: Any) -> None:
        worker.finish(piece)
        results[piece] = result

    with Dispatcher([pool], on_loss=lambda worker, held: waiting.extendleft(held)) as dispatcher:
        while waiting or dispatcher.busy:
            if waiting:  # a newcomer without a piece to do can wait until the next round
                pool.admit()
                if not pool.workers:
                    pool.admit_first()
            for worker in pool.workers:
                if waiting and not worker.calls:
                    piece = waiting.popleft()
                    worker.held[piece] = None
                    dispatcher.submit(worker, method, pieces[piece], *args, then=partial(keep, worker, piece))
            dispatcher.deliver(dispatcher.poll(LOOK_S))
    return results
