"""Groups on their way from the prompts to a batch, when generation runs ahead of the learner; and how far ahead it may.

A group is a prompt with its samples. Group p belongs to step p // groups_per_step. The life of a group:

    admitted ─▶ waiting ─▶ generating ─▶ generated ─▶ scoring ─▶ scored ─▶ taken by a batch
                 ▲ ▲            │ its generator died     ▲   │  │ its scorer died
                 │ └────────────┘                        └───┼──┘
                 └───────────────────────────────────────────┘ it teaches nothing: another prompt has its position

Groups are dispatched in the order of their positions. A batch takes those that are finished first, so that a long
response does not hold a step up. Each position is trained on exactly once.

No token may be older than staleness k when it is trained: at most k versions behind the learner's weights. Two rules
keep this (as in AReaL, Fu et al. 2025, section 5.1, but for every token):

1. Under the weights of step s, no group beyond step s + k is dispatched.
2. A group whose oldest token has version u must be trained by version u + k. So when the batch for version v is taken:
   every group with u <= v - k is in it; at most one batch's worth with u <= v - k + 1 is left over; at most two with
   u <= v - k + 2; and so on. If more of them are unfinished, the batch waits.

Example with k = 2, two groups a step, and weights of version 0 at step 0. Group 1 has a very long response:

    batch of   version   dispatched before   it takes   left over
    step 0        0        0 1 2 3 4 5         0 2      1 3 4 5 with u = 0: two batches' worth, as many as may be
    step 1        1        6 7                 3 4      1 5 with u = 0: one batch's worth; 6 7 with u = 1
    step 2        2        8 9                 1 5      u = 0 = v - k: this batch waits for group 1
    step 3        3        10 11               6 7      no group with u = 1; 8 9 with u = 2, 10 11 with u = 3

A group that takes the position of another one (`StepPrompts.redraw`) is dispatched with newer weights than the other.
So it has more time, and the number of groups that a rule is about does not change.

With k = 1 no group can be late: all groups in flight belong to the next batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import NamedTuple

from rayrlhf.trajectory import GenerationRequest, SerializedTrajectory

PLACES = ("waiting", "generating", "scoring", "scored")
"""Where a group is until a batch takes it."""


Redraw = Callable[[int, int, Sequence[SerializedTrajectory]], Sequence[GenerationRequest] | None]
"""See `StepPrompts.redraw`."""


def keep(position: int, redraws: int, trajectories: Sequence[SerializedTrajectory]) -> None:
    """The `Redraw` by which every group stays in its batch."""


class Cursor(NamedTuple):
    """Which groups the batches have taken: all of the steps before `next_step`, except those at `untrained`.

    The learner's checkpoint has it; a learner that comes back goes on from it.
    """

    next_step: int
    untrained: tuple[int, ...] = ()
    """Positions."""


@dataclass(frozen=True)
class Limits:
    """How much may be in flight, and how far ahead of the learner."""

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
    """The oldest weights that one of its tokens may be from; None until it is dispatched."""
    trajectories: list[SerializedTrajectory] = field(default_factory=list)
    tokens: int = 0
    """Prompt and response tokens of the trajectories."""
    redraws: int = 0
    """How many groups have had the position before."""

    @property
    def generated(self) -> bool:
        """Whether every sample has its trajectory."""
        return len(self.trajectories) == len(self.requests)

    def missing(self) -> dict[int, GenerationRequest]:
        """The requests without a trajectory, by ticket. Tickets of all groups differ."""
        tickets = dict(enumerate(self.requests, self.position * len(self.requests)))
        if not self.trajectories:
            return tickets
        done = {t.sample_index for t in self.trajectories}
        return {ticket: request for ticket, request in tickets.items() if request.sample_index not in done}


class GroupQueue:
    """Where each group is. It knows the rules of staleness and no actors; its user locks it."""

    def __init__(
        self,
        groups_of_step: Callable[[int], Sequence[Sequence[GenerationRequest]]],
        limits: Limits,
        cursor: Cursor,
        redraw: Redraw = keep,
    ) -> None:
        """
        Args:
            groups_of_step: the requests of a step's groups; a pure function.
            cursor: what earlier batches have taken.
            redraw: which of the scored groups give their positions to others.
        """
        self._groups_of_step, self.limits, self._redraw = groups_of_step, limits, redraw
        self.waiting: deque[Group] = deque()
        self.dispatched: dict[int, Group] = {}
        """Groups that were given to a generator and that no batch has taken, by position."""
        self._generated: deque[Group] = deque()
        self.generated_tokens = 0
        """Of the groups that are to be scored next."""
        self.scored: dict[int, Group] = {}
        self._next_step = cursor.next_step
        self._last_step = -1
        """The last step whose groups may be dispatched."""
        self._due: list[set[int]] = []
        """Element j: unscored groups that must be trained within the next j + 1 batches."""
        for position in cursor.untrained:
            of_step = groups_of_step(position // limits.groups_per_step)
            self.waiting.append(Group(position, list(of_step[position % limits.groups_per_step])))

    # ---- the ways of a group, in their order

    def allow(self, step: int) -> None:
        """The newest weights are those of `step`: groups of up to `max_staleness` steps later may be dispatched."""
        self._last_step = min(step + self.limits.max_staleness, self.limits.steps - 1)

    def admit_next_step(self) -> None:
        """Let the groups of the next step wait, if none does and the weights allow it."""
        if not self.waiting and self._next_step <= self._last_step:
            start = self._next_step * self.limits.groups_per_step
            groups = self._groups_of_step(self._next_step)
            self.waiting += [Group(start + i, list(requests)) for i, requests in enumerate(groups)]
            self._next_step += 1

    def dispatch(self, version: int) -> Group:
        """The first group that waits, for a generator that gets weights of `version` with it."""
        group = self.waiting.popleft()
        if group.version is None:  # otherwise its generator died: some of its samples may be older
            group.version = version
        self.dispatched[group.position] = group
        return group

    def add_trajectory(self, group: Group, trajectory: SerializedTrajectory) -> None:
        """A sample of the group is generated."""
        group.trajectories.append(trajectory)
        group.tokens += trajectory.length
        if group.generated:
            group.trajectories.sort(key=attrgetter("sample_index"))
            self._generated.append(group)
            self.generated_tokens += group.tokens

    @property
    def to_score(self) -> bool:
        return bool(self._generated)

    def next_piece(self) -> list[Group]:
        """Groups to be scored together: just enough to reach `score_tokens`, if there are so many."""
        piece: list[Group] = []
        tokens = 0
        while self._generated and tokens < self.limits.score_tokens:
            piece.append(self._generated.popleft())
            tokens += piece[-1].tokens
        self.generated_tokens -= tokens
        return piece

    def add_scored(self, groups: Sequence[Group], trajectories: Iterable[SerializedTrajectory]) -> None:
        """A piece is scored: `trajectories` are those of all its groups, in order."""
        scored: Iterator[SerializedTrajectory] = iter(trajectories)
        for group in groups:
            group.trajectories = [next(scored) for _ in group.requests]
            for due in self._due:
                due.discard(group.position)
            requests = self._redraw(group.position, group.redraws, group.trajectories)
            if requests is None:
                self.scored[group.position] = group
            else:
                del self.dispatched[group.position]
                self.waiting.appendleft(Group(group.position, list(requests), redraws=group.redraws + 1))

    def put_back(self, groups: Iterable[Group]) -> None:
        """The actor that had these groups died: they come next, to be generated or to be scored."""
        lost = {group.position: group for group in groups}
        for position in sorted(lost, reverse=True):
            group = lost[position]
            if group.generated:
                self._generated.appendleft(group)
                self.generated_tokens += group.tokens
            else:
                self.waiting.appendleft(group)

    # ---- batches

    def require(self, version: int) -> None:
        """The next batch is for a learner with weights of `version`: `complete` is about this batch from now on."""
        oldest, size = version - self.limits.max_staleness, self.limits.groups_per_step
        self._due = []
        for j in range(self.limits.max_staleness):
            # Groups that are dispatched later have newer weights: they do not come into these sets.
            due = {g.position for g in self.dispatched.values() if g.version is not None and g.version <= oldest + j}
            assert len(due) <= (j + 1) * size, "more groups were dispatched than staleness allows"
            self._due.append(due - self.scored.keys())

    @property
    def complete(self) -> bool:
        """Whether the batch can be taken: it is full, and leaves no more than the next ones have room for."""
        size = self.limits.groups_per_step
        return len(self.scored) >= size and all(len(due) <= j * size for j, due in enumerate(self._due))

    def take(self) -> list[Group]:
        """The groups of a batch that is complete, those with the oldest weights first chosen, in order of positions."""
        oldest_first = sorted(self.scored.values(), key=lambda group: (group.version, group.position))
        chosen = sorted(oldest_first[: self.limits.groups_per_step], key=attrgetter("position"))
        for group in chosen:
            del self.dispatched[group.position], self.scored[group.position]
        return chosen

    def cursor(self) -> Cursor:
        """What is left for the batches to come."""
        untrained = {*self.dispatched, *(group.position for group in self.waiting)}
        return Cursor(self._next_step, tuple(sorted(untrained)))

    def places(self, at_scorers: int) -> dict[str, int]:
        """How many groups are at each of `PLACES`; scorers have `at_scorers` of them."""
        waiting, scored, scoring = len(self.waiting), len(self.scored), len(self._generated) + at_scorers
        # A group that waits again, because its generator died, is still among the dispatched ones.
        known = len(self.dispatched.keys() | {group.position for group in self.waiting})
        return dict(zip(PLACES, (waiting, known - waiting - scoring - scored, scoring, scored), strict=True))
