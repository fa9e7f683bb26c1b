"""Asynchronous PPO: generation and scoring run ahead of the learner, which never sees tokens that are too old.

    waiting ─▶ generators ─▶ generated ─▶ scorers ─▶ scored ─▶ next_batch

What moves is a group: a prompt with its samples. Group p belongs to step p // prompts_per_step, in the order of which
groups are dispatched; a batch takes those that are finished first, so that a long response does not hold a step up.
Staleness k is kept by two rules (as in AReaL, Fu et al. 2025, section 5.1, but for every token):

- under the weights of step s, no group beyond step s + k is dispatched;
- of the groups that have tokens of the weights of step s - k + j or older, the batch of step s leaves at most what the
  j batches fit in that can still have them, and waits if fewer are finished: for j = 0 it contains them all.

Each group is trained exactly once. With k = 1 nothing can be late: all that is in flight is the next batch.
"""

from __future__ import annotations

import gc
import heapq
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple

from actors.pools.members import CALLS_PER_S, QUEUE, Member, Members
from actors.pools.pool import Pool
from actors.pools.remote import ActorDied, ActorFailure
from actors.rollouts.generator import INITIAL_VERSION, SLICE_S
from actors.rollouts.weight_sync import PublishedWeights
from rayrlhf.trajectory import GenerationRequest, Sampling, SerializedTrajectory

_COLLECT_AFTER = 50_000
"""New objects between two looks for garbage in cycles."""
_BUNDLE_S = 0.02
"""What is answered within this time is taken in together: many calls at once cost less than as many one by one."""
_POLL_S = 0.05
"""New weights and groups are looked for at least this often, and a scorer gets less than a full piece at most so."""
PLACES = ("waiting", "generating", "scoring", "scored")
"""Where a group is until a batch takes it."""


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
    trajectories: list[SerializedTrajectory] = field(default_factory=list)
    tokens: int = 0
    """Of the trajectories."""

    def missing(self) -> dict[int, GenerationRequest]:
        """The requests that have no trajectory yet, by ticket."""
        tickets = dict(enumerate(self.requests, self.position * len(self.requests)))
        if not self.trajectories:
            return tickets
        done = {t.sample_index for t in self.trajectories}
        return {ticket: request for ticket, request in tickets.items() if request.sample_index not in done}


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
        self._generated_tokens = 0
        self.scored: dict[int, Group] = {}
        self._next_step = cursor.next_step
        for position in cursor.untrained:
            of_step = groups_of_step(position // limits.groups_per_step)
            self.waiting.append(Group(position, list(of_step[position % limits.groups_per_step])))
        self._members = Members([generators, scorers], died=self._lose)
        self._generators, self._scorers = self._members.of[generators], self._members.of[scorers]
        for member in self._generators:
            member.version = publication.version
        self._free = dict.fromkeys(self._generators)
        """Generators that may be given a call, in the order in which they became free."""
        self._due: list[set[int]] = []
        """Groups that are not scored and have to be in one of the next j + 1 batches, at j."""
        self._poll_s = _POLL_S if background else 0.0
        self._changed = threading.Condition()
        self._failure: BaseException | None = None
        self._stopping = False
        self._thread: threading.Thread | None = None
        if background:
            self._thread = threading.Thread(target=self._run, name="rollouts", daemon=True)
            self._thread.start()

    # ---- called by the coordinator

    def set_weights(self, publication: PublishedWeights) -> None:
        """New weights: every generator loads them with the next call that it is given. Returns at once."""
        with self._changed:
            self.publication = publication

    def take(self, step: int, version: int, timeout_s: float) -> list[Group]:
        """The groups of the batch of `step`, for a learner whose weights are `version`, in the order of positions."""
        oldest = version - self.limits.max_staleness
        size = self.limits.groups_per_step
        deadline = time.monotonic() + timeout_s
        with self._changed:
            self._due = []
            for j in range(self.limits.max_staleness):
                # None is added later: what is dispatched from now on is of newer weights.
                due = {
                    g.position for g in self.dispatched.values() if g.version is not None and g.version <= oldest + j
                }
                assert len(due) <= (j + 1) * size, "more groups were dispatched than staleness allows"
                self._due.append(due - self.scored.keys())
            while not self._failure and not self._complete:
                if time.monotonic() > deadline:
                    raise ActorFailure(
                        f"the batch of step {step} was not complete within {timeout_s:.0f} s: {len(self.scored)} of "
                        f"{size} prompts are scored, {len(self.dispatched)} in flight"
                    )
                if self._thread:
                    self._changed.wait(1.0)
                else:
                    self._tick()
            if self._failure:
                raise self._failure
            oldest_first = sorted(self.scored.values(), key=lambda group: (group.version, group.position))
            chosen = sorted(oldest_first[:size], key=attrgetter("position"))
            for group in chosen:
                del self.dispatched[group.position], self.scored[group.position]
            return chosen

    @property
    def _complete(self) -> bool:
        size = self.limits.groups_per_step
        return len(self.scored) >= size and all(len(due) <= j * size for j, due in enumerate(self._due))

    def cursor(self) -> Cursor:
        """What is left for the batches to come."""
        with self._changed:
            untrained = {*self.dispatched, *(group.position for group in self.waiting)}
            return Cursor(self._next_step, tuple(sorted(untrained)))

    def groups(self) -> dict[str, int]:
        """How many groups are at each of `PLACES`."""
        with self._changed:
            scored, waiting = len(self.scored), len(self.waiting)
            scoring = len(self.generated) + sum(len(member.held) for member in self._scorers)
            # A group that waits again, for its generator died, stays among the dispatched.
            known = len(self.dispatched.keys() | {group.position for group in self.waiting})
            return dict(zip(PLACES, (waiting, known - waiting - scoring - scored, scoring, scored), strict=True))

    def versions(self) -> dict[str, int]:
        """The weights that each generator has, or has been asked to load before its next work."""
        with self._changed:
            return {member.remote.name: member.version for member in self._generators}

    def stop(self) -> None:
        """End the thread and drop what is in flight."""
        self._stopping = True
        if self._thread:
            self._thread.join()
        self.generators.broadcast("abort")

    # ---- the pipeline

    def _run(self) -> None:
        # Python would look through groups and requests for cycles again and again while steps make more of them: a
        # fifth of what a trajectory cost, for nothing. There is such a thread in the coordinator's own process only.
        gc.set_threshold(_COLLECT_AFTER, 10, 10)
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
            self._resize()
            self._feed()
        answers = self._members.answers(self._poll_s)
        if answers and self._poll_s:
            time.sleep(_BUNDLE_S)
            answers += self._members.answers(0)
        with self._changed:
            for member in self._members.hand_on(answers):
                if member.pool is self.generators and len(member.calls) < QUEUE:
                    self._free[member] = None
            if self._complete:
                self._changed.notify_all()

    def _resize(self) -> None:
        """Take in newcomers, who get the weights with their first work, and let go whoever is too many and done."""
        for member in self._members.add(self.generators, self.generators.join()):
            member.version = INITIAL_VERSION
            self._free[member] = None
        for member in self._members.leave(self.generators):
            self._free.pop(member, None)
        self._members.add(self.scorers, self.scorers.join())
        self._members.leave(self.scorers)

    def _feed(self) -> None:
        given = self._dispatch()
        for member in [member for member in self._free if member.held]:
            self._advance(member, given.get(member.index, {}))
            while len(member.calls) < QUEUE:
                self._advance(member, {})
            del self._free[member]
        for member in self._scorers:
            while self._may_score(member):
                groups = list(self._piece())
                trajectories = [t for group in groups for t in group.trajectories]
                member.held |= {group.position: group for group in groups}
                then = partial(self._on_scored, member, groups)
                self._members.ask(
                    member, "score_serialized", trajectories, self.sampling.temperature, then=then, serialized=True
                )

    def _advance(self, member: Member, requests: dict[int, GenerationRequest]) -> None:
        # New weights wait for two slices at most: they come with the next call, and one may be queued before it.
        slice_s = max(SLICE_S, len(self.generators) / CALLS_PER_S)
        arguments: list[Any] = [requests, self.sampling, slice_s]
        newer = member.version < self.publication.version
        if newer:  # as an argument of its own: the object store counts its references
            member.version = self.publication.version
            arguments.append(self.publication)
        self._members.ask(member, "advance", *arguments, then=partial(self._on_generated, member), serialized=not newer)

    def _dispatch(self) -> dict[int, dict[int, GenerationRequest]]:
        """Requests by ticket for each generator with room, the one with least work first."""
        given: dict[int, dict[int, GenerationRequest]] = {}
        if not self._waiting():
            return given
        room = [(len(member.held), member.index) for member in self._free if not member.leaving]
        heapq.heapify(room)
        while room and self._waiting():
            load, index = room[0]
            group = self.waiting[0]
            if load and load + len(group.requests) > self.limits.generator_requests:
                break  # nobody has less to do
            self.waiting.popleft()
            member = self._generators[index]
            if group.version is None:  # else some of its samples are of that one
                group.version = self.publication.version
            self.dispatched[group.position] = group
            missing = group.missing()
            given.setdefault(index, {}).update(missing)
            member.held |= dict.fromkeys(missing, group)
            heapq.heapreplace(room, (len(member.held), index))
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

    def _on_generated(self, member: Member, done: dict[int, SerializedTrajectory]) -> None:
        for ticket, trajectory in done.items():
            group = member.held.pop(ticket)
            group.trajectories.append(trajectory)
            group.tokens += trajectory.length
            if len(group.trajectories) == len(group.requests):
                group.trajectories.sort(key=attrgetter("sample_index"))
                self.generated.append(group)
                self._generated_tokens += group.tokens

    def _may_score(self, member: Member) -> bool:
        """Whether there is a full piece for the scorer, or it waits and has not been asked just now."""
        if member.leaving:
            return False
        if self._generated_tokens >= self.limits.score_tokens:
            return len(member.calls) < QUEUE
        return bool(self.generated) and not member.calls and time.monotonic() - member.asked_at >= self._poll_s

    def _piece(self) -> Iterator[Group]:
        """Groups to be scored together."""
        tokens = 0
        while self.generated and tokens < self.limits.score_tokens:
            group = self.generated.popleft()
            tokens += group.tokens
            yield group
        self._generated_tokens -= tokens

    def _on_scored(self, member: Member, groups: Sequence[Group], trajectories: list[SerializedTrajectory]) -> None:
        scored = iter(trajectories)
        for group in groups:
            del member.held[group.position]
            group.trajectories = [next(scored) for _ in group.requests]
            self.scored[group.position] = group
            for due in self._due:
                due.discard(group.position)

    def _lose(self, member: Member, death: ActorDied) -> None:
        """What a dead one had goes back, to be given to the others; a newcomer is on its way."""
        lost = {group.position: group for group in self._members.lose(member, death).values()}
        self._free.pop(member, None)
        again = sorted(lost.values(), key=lambda group: -group.position)
        if member.pool is self.generators:
            self.waiting.extendleft(again)
        else:
            self.generated.extendleft(again)
            self._generated_tokens += sum(group.tokens for group in again)
