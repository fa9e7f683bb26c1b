"""Asynchronous PPO: generation and scoring run ahead of the learner, which never sees tokens that are too old.

    waiting ─▶ generators ─▶ generated ─▶ scorers ─▶ scored ─▶ next_batch

What moves is a group: a prompt with its samples. Group p belongs to step p // prompts_per_step, in the order of which
groups are dispatched; a batch takes those that are finished first, so that a long response does not hold a step up.
Staleness k is kept by two rules (as in AReaL, Fu et al. 2025, section 5.1, but for every token):

- under the weights of step s, no group beyond step s + k is dispatched;
- the batch of step s contains every group that has tokens of the weights of step s - k, and waits for them.

Each group is trained exactly once. With k = 1 nothing can be late: all that is in flight is the next batch.
"""

from __future__ import annotations

import heapq
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from actors.generator import SLICE_S
from actors.pool import Pool
from actors.remote import ActorDied, ActorFailure, Call, finished, late, wait
from actors.weight_sync import PublishedWeights
from rayrlhf.trajectory import GenerationRequest, Sampling, Trajectory

_CALLS_PER_S = 100
"""To all generators together. Slices of very many are longer, since each call costs the coordinator CPU time; new
weights wait for at most two slices."""
_QUEUE = 2
"""Calls that an actor has at a time: the second is there when it ends the first."""
_POLL_S = 0.05


class Cursor(NamedTuple):
    """Which groups have been in a batch: all of the steps before `next_step`, but for those at `untrained`."""

    next_step: int
    untrained: tuple[int, ...] = ()


@dataclass(frozen=True)
class Limits:
    """How much is in flight, and how far ahead."""

    steps: int
    groups_per_step: int
    max_staleness: int
    generator_requests: int
    """Requests that one generator has at a time."""
    score_tokens: int
    """Tokens that a scorer is given at a time."""


@dataclass
class Group:
    """A prompt with its samples."""

    position: int
    requests: list[GenerationRequest]
    version: int | None = None
    """The oldest weights that a token of it may be from; None until it is dispatched."""
    trajectories: list[Trajectory] = field(default_factory=list)


@dataclass(eq=False)
class _Member:
    """One actor of a pool, with the calls that it has still to answer and what they are worth."""

    pool: Pool
    index: int
    calls: deque[tuple[Call, float, Callable[[Any], None]]] = field(default_factory=deque)
    held: dict[int, Group] = field(default_factory=dict)
    """Work that would be lost with it: group by ticket."""
    version: int = 0
    """Weights that it has been asked to load."""
    free_at: float = 0.0
    """When it answered last."""


class Rollouts:
    """Feeds generators and scorers from a thread of its own (or, with local actors, while a batch is waited for)."""

    def __init__(
        self,
        generators: Pool,
        scorers: Pool,
        groups_of_step: Callable[[int], Sequence[Sequence[GenerationRequest]]],
        sampling: Sampling,
        limits: Limits,
        *,
        step: int,
        cursor: Cursor,
        publication: PublishedWeights,
        background: bool,
    ) -> None:
        """Start before the batch of `step`, whose weights `publication` all generators hold.

        Args:
            groups_of_step: the requests of a step's groups; a pure function.
            cursor: which groups former batches have had.
        """
        self.generators, self.scorers = generators, scorers
        self.groups_of_step, self.sampling, self.limits = groups_of_step, sampling, limits
        self.first = (step, publication.version)
        self.publication = publication
        self.waiting: deque[Group] = deque()
        self.dispatched: dict[int, Group] = {}
        """Not yet in a batch, by position."""
        self.generated: deque[Group] = deque()
        self.scored: dict[int, Group] = {}
        self._next_step = cursor.next_step
        for position in cursor.untrained:
            of_step = groups_of_step(position // limits.groups_per_step)
            self.waiting.append(Group(position, list(of_step[position % limits.groups_per_step])))
        self._slice_s = max(SLICE_S, len(generators) / _CALLS_PER_S)
        self._writers = [_Member(generators, i, version=publication.version) for i in range(len(generators))]
        self._readers = [_Member(scorers, i) for i in range(len(scorers))]
        self._changed = threading.Condition()
        self._failure: BaseException | None = None
        self._stopping = False
        self._thread: threading.Thread | None = None
        if background:
            self._thread = threading.Thread(target=self._run, name="rollouts", daemon=True)
            self._thread.start()

    # ---- called by the coordinator

    def publish(self, publication: PublishedWeights) -> None:
        """New weights: every generator loads them after the slice it works on. Returns at once."""
        with self._changed:
            self.publication = publication
            self._changed.notify_all()

    def take(self, step: int, version: int, timeout_s: float) -> list[Group]:
        """The groups of the batch of `step`, for a learner whose weights are `version`, in the order of positions."""
        oldest = version - self.limits.max_staleness
        deadline = time.monotonic() + timeout_s
        with self._changed:
            # None is added later: what is dispatched from now on is of newer weights.
            due = {g.position for g in self.dispatched.values() if g.version is not None and g.version <= oldest}
            missing = due.copy()
            while not self._failure:
                missing -= self.scored.keys() & missing
                if len(self.scored) >= self.limits.groups_per_step and not missing:
                    break
                if time.monotonic() > deadline:
                    raise ActorFailure(
                        f"the batch of step {step} was not complete within {timeout_s:.0f} s: {len(self.scored)} of "
                        f"{self.limits.groups_per_step} prompts are scored, {len(self.dispatched)} in flight"
                    )
                if self._thread:
                    self._changed.wait(1.0)
                else:
                    self._tick()
            if self._failure:
                raise self._failure
            assert len(due) <= self.limits.groups_per_step, "more groups were dispatched than staleness allows"
            others = sorted(self.scored.keys() - due)
            chosen = sorted([*due, *others[: self.limits.groups_per_step - len(due)]])
            for position in chosen:
                del self.dispatched[position]
            return [self.scored.pop(position) for position in chosen]

    def cursor(self) -> Cursor:
        """What is left for the batches to come."""
        with self._changed:
            untrained = {*self.dispatched, *(group.position for group in self.waiting)}
            return Cursor(self._next_step, tuple(sorted(untrained)))

    def stop(self) -> None:
        """End the thread and drop what is in flight."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread:
            self._thread.join()
        self.generators.broadcast("abort")

    # ---- the pipeline

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._tick()
        except BaseException as error:  # whoever waits for a batch is told
            with self._changed:
                self._failure = error
                self._changed.notify_all()

    def _tick(self) -> None:
        """Give out what can be given out, then take in what is finished."""
        with self._changed:
            self._feed()
            heads = [member.calls[0] for member in self._members() if member.calls]
            if not heads and self._thread:
                self._changed.wait(1.0)
        if not heads:
            return
        done = set(finished([call for call, _, _ in heads], _POLL_S))
        with self._changed:
            now = time.monotonic()
            for member in self._members():
                if not member.calls:
                    continue
                call, limit_s, handle = member.calls[0]
                if call in done:
                    self._answered(member, call, limit_s, handle)
                elif now - max(call.started, member.free_at) > limit_s:
                    raise late(call, limit_s)
            self._changed.notify_all()

    def _answered(self, member: _Member, call: Call, limit_s: float, handle: Callable[[Any], None]) -> None:
        try:
            (result,) = wait([call], limit_s)
        except ActorDied as death:
            self._replace(member, death)
            return
        now = time.monotonic()
        member.pool.busy_s[member.index] += now - max(call.started, member.free_at)
        member.free_at = now
        member.calls.popleft()
        handle(result)

    def _feed(self) -> None:
        for member in self._writers:
            if member.version < self.publication.version:
                member.version = self.publication.version
                self._submit(member, "load_weights", self.publication)
        given = self._dispatch()
        for member in self._writers:
            requests = given.get(member.index, {})
            while requests or (member.held and len(member.calls) < _QUEUE):
                self._submit(member, "advance", requests, self.sampling, self._slice_s, then=self._written_by(member))
                requests = {}
        for member in self._readers:
            while self.generated and len(member.calls) < _QUEUE:
                groups = list(self._piece())
                trajectories = [t for group in groups for t in group.trajectories]
                member.held |= {group.position: group for group in groups}
                then = self._read_by(member, groups)
                self._submit(member, "score", trajectories, self.sampling.temperature, then=then)

    def _dispatch(self) -> dict[int, dict[int, GenerationRequest]]:
        """Requests by ticket for each generator with room, the one with least work first."""
        given: dict[int, dict[int, GenerationRequest]] = {}
        room = [(len(m.held), m.index) for m in self._writers if len(m.calls) < _QUEUE]
        heapq.heapify(room)
        while room and self._waiting():
            load, index = heapq.heappop(room)
            group = self.waiting[0]
            if load and load + len(group.requests) > self.limits.generator_requests:
                break  # nobody has less to do
            self.waiting.popleft()
            member = self._writers[index]
            group.version = member.version if group.version is None else min(group.version, member.version)
            self.dispatched[group.position] = group
            tickets = {group.position * len(group.requests) + i: r for i, r in enumerate(group.requests)}
            missing = {t: r for t, r in tickets.items() if not self._has(group, r)}
            given.setdefault(index, {}).update(missing)
            member.held |= dict.fromkeys(missing, group)
            heapq.heappush(room, (len(member.held), index))
        return given

    def _waiting(self) -> bool:
        """Whether a group may be dispatched under the newest weights."""
        first_step, first_version = self.first
        ahead = first_step + self.publication.version - first_version + self.limits.max_staleness
        if not self.waiting and self._next_step <= min(ahead, self.limits.steps - 1):
            start = self._next_step * self.limits.groups_per_step
            self.waiting += [Group(start + i, list(rs)) for i, rs in enumerate(self.groups_of_step(self._next_step))]
            self._next_step += 1
        return bool(self.waiting)

    def _written_by(self, member: _Member) -> Callable[[dict[int, Trajectory]], None]:
        def written(done: dict[int, Trajectory]) -> None:
            for ticket, trajectory in done.items():
                group = member.held.pop(ticket)
                group.trajectories.append(trajectory)
                if len(group.trajectories) == len(group.requests):
                    group.trajectories.sort(key=lambda t: t.sample_index)
                    self.generated.append(group)

        return written

    def _piece(self) -> Iterator[Group]:
        """Groups to be scored together."""
        tokens = 0
        while self.generated and tokens < self.limits.score_tokens:
            group = self.generated.popleft()
            tokens += sum(t.length for t in group.trajectories)
            yield group

    def _read_by(self, member: _Member, groups: Sequence[Group]) -> Callable[[list[Trajectory]], None]:
        def read(trajectories: list[Trajectory]) -> None:
            scored = iter(trajectories)
            for group in groups:
                del member.held[group.position]
                group.trajectories = [next(scored) for _ in group.requests]
                self.scored[group.position] = group

        return read

    def _replace(self, member: _Member, death: ActorDied) -> None:
        """A new actor, which is ready and up to date before its first work; what the dead one had goes back."""
        member.pool.respawn(member.index, death)
        lost = {group.position: group for group in member.held.values()}
        member.held, member.calls, member.free_at = {}, deque(), 0.0
        self._submit(member, "ready", limit_s=member.pool.start_timeout_s)
        if member.pool is self.generators:
            member.version = 0
            self.waiting.extendleft(sorted(lost.values(), key=lambda group: -group.position))
        else:
            self.generated.extendleft(sorted(lost.values(), key=lambda group: -group.position))

    def _submit(
        self,
        member: _Member,
        method: str,
        *args: Any,
        then: Callable[[Any], None] = lambda result: None,
        limit_s: float | None = None,
    ) -> None:
        call = member.pool.actors[member.index].submit(method, *args)
        member.calls.append((call, member.pool.call_timeout_s if limit_s is None else limit_s, then))

    def _members(self) -> Iterator[_Member]:
        yield from self._writers
        yield from self._readers

    @staticmethod
    def _has(group: Group, request: GenerationRequest) -> bool:
        return any(t.sample_index == request.sample_index for t in group.trajectories)
