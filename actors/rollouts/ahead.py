"""Asynchronous RL: generation and scoring run ahead of the learner, which never sees tokens that are too old.

    GroupQueue ─▶ generators ─▶ GroupQueue ─▶ scorers ─▶ GroupQueue ─▶ next_batch

`GroupQueue` says which group may go where; this file keeps the workers of both pools fed. A generator works in slices
of a fraction of a second (`Generator.advance`). Weights come with a slice, so they may change within a response:

    learner      trains on batch 0           set_weights(1)   trains on batch 1
    generator    │ slice │ slice │ slice │ slice │ slice: loads version 1 first │ slice │ ...
    response A   ├─ tokens of version 0 ────────┤├─ tokens of version 1 ─────────────────▶
"""

from __future__ import annotations

import gc
import heapq
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from actors.pools.dispatch import CALLS_PER_S, QUEUE, Dispatcher
from actors.pools.pool import Pool
from actors.pools.remote import ActorFailure
from actors.pools.worker import Worker
from actors.rollouts.batch import Batch
from actors.rollouts.generator import SLICE_S
from actors.rollouts.groups import Cursor, Group, GroupQueue, Limits, Redraw, keep
from actors.rollouts.weight_sync import PublishedWeights
from rayrlhf.trajectory import GenerationRequest, Sampling, SerializedTrajectory

_COLLECT_AFTER = 50_000
"""New objects between two searches of Python's for garbage in cycles."""
_BUNDLE_S = 0.02
"""Answers within this time are delivered together: many calls at once cost less than as many one by one."""
_POLL_S = 0.05
"""Longest wait for answers before the loop looks for new weights and groups. A scorer gets a partial piece at most this
often."""


class Ahead:
    """The rollout mode in which the actors go on while the learner trains; see `in_turn` for the other one.

    A thread feeds the pools; with local actors the caller of `next_batch` does. The thread starts with the first batch
    that is asked for, since only then the step of the newest weights is known.
    """

    def __init__(
        self,
        generators: Pool,
        scorers: Pool,
        groups_of_step: Callable[[int], Sequence[Sequence[GenerationRequest]]],
        sampling: Sampling,
        limits: Limits,
        *,
        cursor: Cursor,
        background: bool,
        timeout_s: float,
        redraw: Redraw = keep,
    ) -> None:
        """
        Args:
            groups_of_step: the requests of a step's groups; a pure function.
            cursor: which groups earlier batches have taken.
            background: feed the pools from a thread.
            timeout_s: how long `next_batch` may take.
            redraw: which of the scored groups give their positions to others.
        """
        self.generators, self.scorers = generators, scorers
        self.sampling, self.limits, self.timeout_s = sampling, limits, timeout_s
        self.queue = GroupQueue(groups_of_step, limits, cursor, redraw)
        self.publication: PublishedWeights | None = None
        self._latest: tuple[int, int] | None = None
        """Step and weights of the latest batch that was asked for."""
        self.dispatcher = Dispatcher([generators, scorers], self._on_loss)
        self._free: dict[Worker, None] = {}
        """Generators that may be given a call, in the order in which they became free."""
        self._poll_s = _POLL_S if background else 0.0
        self._background = background
        self._changed = threading.Condition()
        """Holds the lock of all that the thread and the coordinator share."""
        self._failure: BaseException | None = None
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._returned_at = time.monotonic()

    # ---- called by the coordinator: what both modes have

    def set_weights(self, publication: PublishedWeights) -> None:
        """Every generator loads these weights with the next call that it is given. Returns at once."""
        with self._changed:
            self.publication = publication
            if self._latest:
                # Versions rise by one a step, so that these are the weights of this step.
                step, version = self._latest
                self.queue.allow(step + publication.version - version)

    def next_batch(self, step: int, version: int) -> Batch:
        """The scored batch of `step` for a learner with weights of `version`; its tokens are at most k versions old.

        Raises:
            ActorFailure: it took too long, an actor raised, or too many died.
        """
        asked = time.monotonic()
        self.begin_step(step, version)
        groups = self.take(step, version, self.timeout_s)
        taken = time.monotonic()
        serialized = [trajectory for group in groups for trajectory in group.trajectories]
        redrawn = sum(group.redraws for group in groups)
        batch = Batch.of(step, version, serialized, self.cursor(), self.limits.max_staleness, redrawn=redrawn)
        batch.metrics["rollout/learner_wait"] = (taken - asked) / (taken - self._returned_at)
        self._returned_at = time.monotonic()
        return batch

    def cursor(self) -> Cursor:
        """Which groups are left for the batches to come."""
        with self._changed:
            return self.queue.cursor()

    def versions(self) -> dict[str, int]:
        """The weights that each generator has, or has been asked to load before its next work, by name."""
        return {worker.name: worker.version for worker in self.generators.workers}

    def places(self) -> dict[str, int]:
        """How many groups are at each of `PLACES`."""
        with self._changed:
            return self.queue.places(sum(len(worker.held) for worker in self.scorers.workers))

    def check_idle(self, caller: str) -> None:
        """Raise ActorFailure if the actors are at work and cannot do another job."""
        if self._latest:
            raise ActorFailure(f"{caller} was called while the generators work ahead of the learner")

    def stop(self) -> None:
        """End the thread and drop what is in flight."""
        self._stopping = True
        if self._thread:
            self._thread.join()
        if self._latest:
            self.generators.broadcast("abort")
        self.dispatcher.close()

    # ---- a batch

    def begin_step(self, step: int, version: int) -> None:
        """The learner has reached `step`, with weights of `version`: groups up to k steps later may be dispatched."""
        with self._changed:
            if self.publication is None or self.publication.version != version:
                raise ActorFailure(f"next_batch of step {step}: load weights of version {version} before it")
            if self._latest is None:
                self._free = dict.fromkeys(self.generators.workers)
            self._latest = (step, version)
            self.queue.allow(step)
        if self._background and self._thread is None:
            self._thread = threading.Thread(target=self._run, name="ahead", daemon=True)
            self._thread.start()

    def take(self, step: int, version: int, timeout_s: float) -> list[Group]:
        """The groups of the batch of `step`, for a learner whose weights are `version`, in the order of positions."""
        queue, deadline = self.queue, time.monotonic() + timeout_s
        with self._changed:
            queue.require(version)
            while not self._failure and not queue.complete:
                if time.monotonic() > deadline:
                    raise ActorFailure(
                        f"the batch of step {step} was not complete within {timeout_s:.0f} s: {len(queue.scored)} of "
                        f"{self.limits.groups_per_step} prompts are scored, {len(queue.dispatched)} in flight"
                    )
                if self._thread:
                    self._changed.wait(1.0)  # a time-out, since the deadline has to be looked at
                else:
                    self._tick()
            if self._failure:
                raise self._failure
            return queue.take()

    # ---- the loop that feeds the pools

    def _run(self) -> None:
        # Python would look through groups and requests for cycles again and again while steps make more of them: a
        # fifth of what a trajectory cost, for nothing. There is such a thread in the coordinator's own process only.
        gc.set_threshold(_COLLECT_AFTER, 10, 10)
        try:
            while not self._stopping:
                self._tick()
        except BaseException as error:  # raised where a batch is waited for
            with self._changed:
                self._failure = error
                self._changed.notify_all()

    def _tick(self) -> None:
        """Give out what can be given out, then take in what is finished."""
        with self._changed:
            self._resize()
            self._feed_generators()
            self._feed_scorers()
        # Without the lock: a batch may be taken, or new weights set, while no answer comes.
        answers = self.dispatcher.poll(self._poll_s)
        if answers and self._poll_s:
            time.sleep(_BUNDLE_S)
            answers += self.dispatcher.poll(0)
        with self._changed:
            self.dispatcher.deliver(answers)
            if self.queue.complete:
                self._changed.notify_all()

    def _resize(self) -> None:
        """Admit actors that became ready; dismiss idle workers beyond the wanted size."""
        # Newcomers have no version yet: they get the weights with their first work.
        self._free |= dict.fromkeys(self.generators.admit_ready())
        for worker in self.generators.dismiss_idle():
            self._free.pop(worker, None)
        self.scorers.admit_ready()
        self.scorers.dismiss_idle()

    def _feed_generators(self) -> None:
        given = self._dispatch()
        for worker in [worker for worker in self._free if worker.held]:
            self._advance(worker, given.get(worker, {}))
            while len(worker.calls) < QUEUE:
                self._advance(worker, {})
            del self._free[worker]

    def _dispatch(self) -> dict[Worker, dict[int, GenerationRequest]]:
        """Requests by ticket for each generator with room, the one with least work first."""
        given: dict[Worker, dict[int, GenerationRequest]] = {}
        queue, publication = self.queue, self.publication
        queue.admit_next_step()
        if not queue.waiting or publication is None:
            return given
        leaving = set(self.generators.leaving)
        # The number decides between equals, so that the order never depends on which one became free first.
        room = [(len(worker.held), worker.number, worker) for worker in self._free if worker not in leaving]
        heapq.heapify(room)
        while room and queue.waiting:
            load, number, worker = room[0]
            if load and load + len(queue.waiting[0].requests) > self.limits.generator_requests:
                break  # no other generator has less to do
            group = queue.dispatch(publication.version)
            missing = group.missing()
            given.setdefault(worker, {}).update(missing)
            worker.held |= dict.fromkeys(missing, group)
            heapq.heapreplace(room, (len(worker.held), number, worker))
            queue.admit_next_step()
        return given

    def _advance(self, worker: Worker, requests: dict[int, GenerationRequest]) -> None:
        """Have a generator work for a slice; new weights and requests come with it."""
        # So new weights wait for two slices at most: the one under way, and the one that may be queued already.
        publication = self.publication
        assert publication is not None, "work is dispatched under some weights"
        slice_s = max(SLICE_S, len(self.generators) / CALLS_PER_S)
        arguments: list[Any] = [requests, self.sampling, slice_s]
        newer = worker.version < publication.version
        if newer:  # as an argument of its own: the object store counts the references that it sees
            worker.version = publication.version
            arguments.append(publication)
        then = partial(self._on_generated, worker)
        self.dispatcher.submit(worker, "advance", *arguments, then=then, serialized=not newer)

    def _on_generated(self, worker: Worker, done: dict[int, SerializedTrajectory]) -> None:
        for ticket, trajectory in done.items():
            self.queue.add_trajectory(worker.finish(ticket), trajectory)
        if len(worker.calls) < QUEUE:
            self._free[worker] = None

    def _feed_scorers(self) -> None:
        leaving = set(self.scorers.leaving)
        for worker in self.scorers.workers:
            while worker not in leaving and self._may_score(worker):
                groups = self.queue.next_piece()
                trajectories = [t for group in groups for t in group.trajectories]
                worker.held |= {group.position: group for group in groups}
                self.dispatcher.submit(
                    worker, "score_serialized", trajectories, self.sampling.temperature,
                    then=partial(self._on_scored, worker, groups), serialized=True,
                )  # fmt: skip

    def _may_score(self, worker: Worker) -> bool:
        """Whether there is a full piece for the scorer, or any piece and the scorer has been idle for a while."""
        if self.queue.generated_tokens >= self.limits.score_tokens:
            return len(worker.calls) < QUEUE
        return self.queue.to_score and not worker.calls and time.monotonic() - worker.asked_at >= self._poll_s

    def _on_scored(self, worker: Worker, groups: Sequence[Group], trajectories: list[SerializedTrajectory]) -> None:
        for group in groups:
            worker.finish(group.position)
        self.queue.add_scored(groups, trajectories)

    def _on_loss(self, worker: Worker, held: dict[int, Group]) -> None:
        """Other workers get what a dead one had."""
        self._free.pop(worker, None)
        self.queue.put_back(held.values())
