"""Synchronous generation: one call draws all requests and returns when the last is done.

    learner      waits ...................................  trains  waits ...
    generators   load weights │ generate a batch │ idle     idle    load weights │ ...
    scorers      idle                            │ score    idle

What an engine computes together is the same in every run, so runs repeat to the digit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from actors.pools.dispatch import CALLS_PER_S, QUEUE, Dispatcher, map_pieces
from actors.pools.pool import LOOK_S, Pool
from actors.pools.remote import ActorFailure, late
from actors.pools.worker import NO_VERSION, Worker
from actors.rollouts.batch import Batch
from actors.rollouts.groups import PLACES, Cursor, Redraw, keep
from actors.rollouts.rollout_pools import RolloutPools
from actors.rollouts.weight_sync import PublishedWeights, WeightSyncError
from rayrlhf.data.rows import shard
from rayrlhf.trajectory import GenerationRequest, Sampling, SerializedTrajectory, Trajectory

_SLICE_S = 1.0
"""A generator hands over what is finished at least this often, in seconds: it would be lost with the generator."""

Requests = dict[int, GenerationRequest]
"""By ticket."""


class InTurn:
    """The rollout mode in which the learner waits for its batch; see `ahead` for the other one.

    It also serves all stages but `rl`, which have no batches.
    """

    def __init__(
        self,
        pools: RolloutPools,
        groups_of_step: Callable[[int], Sequence[Sequence[GenerationRequest]]],
        sampling: Sampling | None,
        *,
        cursor: Cursor,
        redraw: Redraw = keep,
    ) -> None:
        """
        Args:
            groups_of_step: the requests of a step, by prompt; a pure function.
            sampling: None where no batch will be asked for.
            cursor: which prompts earlier batches have taken.
            redraw: which of a step's groups give their places to others.
        """
        self.pools, self.groups_of_step, self.sampling, self.redraw = pools, groups_of_step, sampling, redraw
        self._cursor = cursor
        self._load_s = 0.0

    def set_weights(self, publication: PublishedWeights) -> None:
        """Load on every generator; returns when all have these weights."""
        started = time.perf_counter()
        load_on_all(self.pools.generators, publication)
        self._load_s = time.perf_counter() - started

    def next_batch(self, step: int, version: int) -> Batch:
        """The scored batch of `step`: every token is drawn from the weights of exactly `version`.

        Raises:
            WeightSyncError: a generator has another version.
            ActorFailure: it took too long, an actor raised, or too many died.
        """
        assert self.sampling is not None, "set_prompts comes before next_batch"
        groups = list(self.groups_of_step(step))
        batch: list[list[SerializedTrajectory]] = [[] for _ in groups]
        missing = dict(enumerate(groups))
        generate_s = score_s = 0.0
        redraws = redrawn = 0
        while missing:
            started = time.perf_counter()
            requests = [request for group in missing.values() for request in group]
            drawn = generate(self.pools.generators, requests, self.sampling, version)
            trajectories = [serialized.load() for serialized in drawn]
            generated = time.perf_counter()
            scored = iter(score(self.pools.scorers, trajectories, self.sampling.temperature))
            for place, group in missing.items():
                batch[place] = [SerializedTrajectory.of(next(scored)) for _ in group]
            generate_s, score_s = generate_s + generated - started, score_s + time.perf_counter() - generated
            again = {p: self.redraw(step * len(groups) + p, redraws, batch[p]) for p in missing}
            missing = {place: group for place, group in again.items() if group is not None}
            redraws, redrawn = redraws + 1, redrawn + len(missing)
        self._cursor = Cursor(step + 1)
        serialized = [trajectory for group in batch for trajectory in group]
        result = Batch.of(step, version, serialized, self._cursor, max_staleness=0, redrawn=redrawn)
        result.metrics.update({"time/load_weights": self._load_s, "time/generate": generate_s, "time/score": score_s})
        return result

    def cursor(self) -> Cursor:
        """Which prompts are left for the batches to come."""
        return self._cursor

    def versions(self) -> dict[str, int]:
        """The weights that each generator has or is loading, by name; those without any are left out."""
        return {w.name: w.version for w in self.pools.started_workers("generator") if w.version != NO_VERSION}

    def places(self) -> dict[str, int]:
        """No group is under way between two batches."""
        return dict.fromkeys(PLACES, 0)

    def check_idle(self, caller: str) -> None:
        """Nothing to raise: the actors have work only during `next_batch`."""

    def stop(self) -> None:
        """Nothing to end."""


def load_on_all(generators: Pool, publication: PublishedWeights) -> None:
    """Load weights on every generator.

    Raises:
        ActorFailure: a generator raised, was late or reports another version, or too many died.
    """
    loaded = generators.broadcast("load_weights", publication)
    for worker, version in zip(generators.workers, loaded, strict=True):
        worker.version = version
    if any(version != publication.version for version in loaded):
        raise ActorFailure(f"weights {publication.version} were published but the generators report {loaded}")


def generate(
    generators: Pool, requests: Sequence[GenerationRequest], sampling: Sampling, version: int
) -> list[SerializedTrajectory]:
    """One trajectory per request, in their order; see `draw`."""
    done = draw(generators, requests, sampling, version, stopped=lambda: False)
    return [done[place] for place in range(len(requests))]


def draw(
    generators: Pool,
    requests: Sequence[GenerationRequest],
    sampling: Sampling,
    version: int,
    stopped: Callable[[], bool],
) -> dict[int, SerializedTrajectory]:
    """Trajectories by the places of their requests, drawn from the policy of exactly `version`.

    They are those of all requests, unless `stopped` says that those which are finished will do.

    Every generator has its share from the start, so that what an engine computes together is the same in every run.
    What a dead one had not finished goes to the others in equal shares, or waits for a newcomer if there are none.
    Example with two generators, five requests and a death:

        generator-0 has 0 1 2, generator-1 has 3 4
        generator-0 hands over 0 and dies: generator-1 is given 1 2 as well, and generator-2 starts
        generator-2 is admitted only if requests wait for a generator, as they would if generator-1 died now

    Once only stragglers have work left, the others are given it as well. A sample does not depend on who draws it, so
    the first one counts. A straggler's slice cannot be cut short: it is waited for, and what is left is dropped.

    Raises:
        UserError: an impossible request, see `Engine.add`.
        WeightSyncError: a generator has another version.
        ActorFailure: a generator raised, was not done with its share within `call_timeout_s`, or too many died.
    """
    done: dict[int, SerializedTrajectory] = {}
    waiting: Requests = dict(enumerate(requests))
    twice: set[int] = set()
    """What a straggler holds and another one, too, or held until one of them was done with it."""

    def finish(worker: Worker, finished: dict[int, SerializedTrajectory]) -> None:
        for ticket, trajectory in finished.items():
            if not trajectory.oldest == trajectory.newest == version:
                drawn = trajectory.oldest
                raise WeightSyncError(f"{worker.name} has version {drawn}, wanted is {version}: sync it first")
            if ticket in done:
                continue  # another one was faster
            done[ticket] = trajectory
            worker.finish(ticket)
            for other in generators.workers if ticket in twice else ():
                other.held.pop(ticket, None)

    def lose(worker: Worker, held: Requests) -> None:
        twice.difference_update(held)
        others = {ticket for other in generators.workers for ticket in other.held}
        waiting.update({ticket: request for ticket, request in held.items() if ticket not in others})

    def give(worker: Worker, share: Requests) -> None:
        worker.held |= share
        slice_s = max(_SLICE_S, len(generators) / CALLS_PER_S)
        then = partial(finish, worker)
        dispatcher.submit(worker, "advance", share, sampling, slice_s, then=then, serialized=True)

    def helpers_of_stragglers() -> list[Worker]:
        slow = generators.stragglers
        others = [worker for worker in generators.workers if worker not in slow] if slow else []
        return others if all(worker.idle for worker in others) else []

    def give_to(workers: Sequence[Worker], tickets: Requests) -> float:
        # Fewer shares than workers where there are few requests: the last ones get none.
        for worker, share in zip(workers, _shares(tickets, len(workers)), strict=False):
            give(worker, share)
        return time.monotonic()

    generators.apply_size()
    given_at = time.monotonic()
    with Dispatcher([generators], on_loss=lose) as dispatcher:
        try:
            while (waiting or dispatcher.busy) and not stopped():
                if waiting:  # while a newcomer loads its weights the others run out of calls: not for one without work
                    generators.admit()
                if waiting and generators.workers:
                    given_at = give_to(generators.workers, waiting)
                    waiting.clear()
                elif helpers := helpers_of_stragglers():
                    left = {t: r for w in generators.stragglers for t, r in w.held.items() if t not in twice}
                    given_at = give_to(helpers, left) if left else given_at
                    twice.update(left)
                for worker in dispatcher.deliver(dispatcher.poll(LOOK_S)):
                    while worker.held and len(worker.calls) < QUEUE:
                        give(worker, {})
                    if worker.held and time.monotonic() - given_at > generators.call_timeout_s:
                        # It answers, but does not get on: the dispatcher sees only calls without an answer.
                        raise late(worker.calls[0].call, generators.call_timeout_s)
        finally:
            # Nobody waits for the answer; the next work finds the engines empty.
            for worker in generators.workers if twice or len(done) < len(requests) else ():
                dispatcher.submit(worker, "abort")
    return done


def score(scorers: Pool, trajectories: Sequence[Trajectory], temperature: float) -> list[Trajectory]:
    """The trajectories with rewards and reference log-probs, in order; each scorer has one share of about equal size.

    Raises:
        ActorFailure: a scorer raised or was late, or too many died.
    """
    scorers.apply_size()
    lengths, prompts = [t.length for t in trajectories], [t.prompt_id for t in trajectories]
    shards = [rows for rows in shard(lengths, len(scorers), prompts) if rows]
    pieces = map_pieces(scorers, "score", [[trajectories[i] for i in rows] for rows in shards], temperature)
    scored = {i: t for rows, piece in zip(shards, pieces, strict=True) for i, t in zip(rows, piece, strict=True)}
    return [scored[i] for i in range(len(trajectories))]


def _shares(requests: Requests, count: int) -> Iterator[Requests]:
    """At most `count` shares of about the same size. Neighbours stay together: samples of a prompt share its prefix."""
    tickets = sorted(requests)
    size = -(-len(tickets) // count)
    for start in range(0, len(tickets), size):
        yield {ticket: requests[ticket] for ticket in tickets[start : start + size]}
