"""Generation in turn: the generators draw a list of requests, and whoever asked waits for all of it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial

from actors.pools.members import CALLS_PER_S, QUEUE, Member, Members
from actors.pools.pool import Pool
from actors.pools.remote import ActorDied, late
from actors.rollouts.weight_sync import WeightSyncError
from rayrlhf.trajectory import GenerationRequest, Sampling, SerializedTrajectory

_SLICE_S = 1.0
"""What is finished is handed over at least this often: it would be lost with the generator."""
_LOOK_S = 1.0
"""Between two looks for newcomers while no answer comes."""

Requests = dict[int, GenerationRequest]
"""By ticket."""


def generate(
    generators: Pool, requests: Sequence[GenerationRequest], sampling: Sampling, version: int
) -> list[SerializedTrajectory]:
    """One trajectory per request, in their order, drawn from the policy of exactly `version`.

    Every generator has its share from the start, so that what an engine computes together is the same in every run.
    What a dead one had not finished goes to the others in equal shares, or waits for a newcomer if there are none.

    Raises:
        UserError: an impossible request, see `Engine.add`.
        WeightSyncError: a generator has another version.
        ActorFailure: a generator raised, was not done with its share within `call_timeout_s`, or too many died.
    """
    done: dict[int, SerializedTrajectory] = {}
    waiting: Requests = dict(enumerate(requests))

    def finish(member: Member, finished: dict[int, SerializedTrajectory]) -> None:
        for ticket, trajectory in finished.items():
            if not trajectory.oldest == trajectory.newest == version:
                drawn = trajectory.oldest
                raise WeightSyncError(f"{member.remote.name} has version {drawn}, wanted is {version}: sync it first")
            done[ticket] = trajectory
            del member.held[ticket]

    def lost(member: Member, death: ActorDied) -> None:
        waiting.update(members.lose(member, death))

    def give(member: Member, share: Requests) -> None:
        member.held |= share
        slice_s = max(_SLICE_S, len(at_work) / CALLS_PER_S)
        members.ask(member, "advance", share, sampling, slice_s, then=partial(finish, member), serialized=True)

    generators.settle()
    given_at = time.monotonic()
    members = Members([generators], died=lost)
    at_work = members.of[generators]
    try:
        while waiting or any(member.calls for member in at_work):
            if waiting:  # while a newcomer loads its weights the others run out of calls: not for one without work
                members.add(generators, generators.welcome())
            if waiting and at_work:
                for member, share in zip(at_work, _shares(waiting, len(at_work)), strict=False):
                    give(member, share)
                waiting.clear()
                given_at = time.monotonic()
            for member in members.hand_on(members.answers(_LOOK_S)):
                while member.held and len(member.calls) < QUEUE:
                    give(member, {})
                if member.held and time.monotonic() - given_at > generators.call_timeout_s:
                    raise late(member.calls[0].call, generators.call_timeout_s)  # it answers, but does not get on
    except BaseException:
        for member in at_work:  # nobody waits for the answer; the next work finds the engines empty
            members.ask(member, "abort")
        raise
    return [done[ticket] for ticket in range(len(requests))]


def _shares(requests: Requests, count: int) -> Iterator[Requests]:
    """At most `count` of about the same size. Neighbours stay together: samples of a prompt share its prefix."""
    tickets = sorted(requests)
    size = -(-len(tickets) // count)
    for start in range(0, len(tickets), size):
        yield {ticket: requests[ticket] for ticket in tickets[start : start + size]}
