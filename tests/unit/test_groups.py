"""Where groups are and when a batch may be taken, without any actor."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from actors.rollouts.groups import Cursor, Group, GroupQueue, Limits
from rayrlhf.trajectory import GenerationRequest, SerializedTrajectory, Trajectory

LIMITS = Limits(steps=9, groups_per_step=2, max_staleness=2, generator_requests=99, score_tokens=10)


def groups_of_step(step: int) -> list[list[GenerationRequest]]:
    return [[GenerationRequest(str(position), (7,), i) for i in range(2)] for position in (2 * step, 2 * step + 1)]


def trajectory(request: GenerationRequest) -> SerializedTrajectory:
    ids, zeros = np.zeros(3, np.int64), np.zeros(3, np.float32)
    prompt = np.asarray(request.prompt_ids)
    return SerializedTrajectory.of(
        Trajectory(request.prompt_id, request.sample_index, request.seed, prompt, ids, zeros, ids, "length")
    )


class Simulation:
    """A queue whose groups are dispatched as soon as they may be."""

    def __init__(self) -> None:
        self.queue = GroupQueue(groups_of_step, LIMITS, Cursor(0))

    def begin(self, step: int) -> list[int]:
        """The weights of `step` arrive, with the same number; returns which groups are dispatched with them."""
        before = set(self.queue.dispatched)
        self.queue.allow(step)
        self.queue.admit_next_step()
        while self.queue.waiting:
            self.queue.dispatch(version=step)
            self.queue.admit_next_step()
        self.queue.require(version=step)
        return sorted(self.queue.dispatched.keys() - before)

    def generate(self, group: Group) -> None:
        for request in group.missing().values():
            self.queue.add_trajectory(group, trajectory(request))

    def finish(self, positions: Iterable[int]) -> None:
        for position in positions:
            self.generate(self.queue.dispatched[position])
        while piece := self.queue.next_piece():
            self.queue.add_scored(piece, [t for group in piece for t in group.trajectories])

    def take(self) -> list[int]:
        assert self.queue.complete
        return [group.position for group in self.queue.take()]


def test_the_example_of_the_module() -> None:
    at = Simulation()
    assert at.begin(0) == [0, 1, 2, 3, 4, 5]
    at.finish([5, 4, 3, 2, 0])
    assert at.take() == [0, 2]
    assert at.begin(1) == [6, 7]
    at.finish([6, 7])
    assert at.take() == [3, 4]
    assert at.queue.cursor() == Cursor(4, (1, 5, 6, 7))
    assert at.begin(2) == [8, 9]
    assert not at.queue.complete, "three groups are scored, but group 1 has to be in this batch"
    at.finish([1])
    assert at.take() == [1, 5]
    assert at.begin(3) == [10, 11]
    assert at.take() == [6, 7]


def test_what_an_actor_lost_is_put_back_where_it_came_from() -> None:
    at = Simulation()
    at.begin(0)
    queue = at.queue
    for position in (4, 5):
        at.generate(queue.dispatched[position])
    (first,) = [queue.dispatched[1]]
    queue.add_trajectory(first, trajectory(first.requests[0]))
    assert [group.position for group in queue.next_piece()] == [4, 5]
    assert queue.places(at_scorers=2) == {"waiting": 0, "generating": 4, "scoring": 2, "scored": 0}
    queue.put_back([queue.dispatched[position] for position in (5, 1, 4, 0, 1)])
    assert queue.places(at_scorers=0) == {"waiting": 2, "generating": 2, "scoring": 2, "scored": 0}
    assert [group.position for group in queue.waiting] == [0, 1]
    assert [request.sample_index for request in first.missing().values()] == [1], "one sample is there already"
    assert [group.position for group in queue.next_piece()] == [4, 5]
