"""Generation in turn: the generators draw a list of requests, and whoever asked waits for all of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from actors.members import QUEUE, Member, Members
from actors.pool import Pool
from actors.remote import ActorDied
from actors.weight_sync import WeightSyncError
from rayrlhf.trajectory import GenerationRequest, PackedTrajectory, Sampling

_SLICE_S = 1.0
"""What is finished is handed over at least this often: it would be lost with the generator."""
_LOOK_S = 1.0
"""Between two looks for newcomers while no answer comes."""

Requests = dict[int, GenerationRequest]
"""By ticket."""


def generate(
    generators: Pool, requests: Sequence[GenerationRequest], sampling: Sampling, version: int
) -> list[PackedTrajectory]:
    """One trajectory per request, in their order, drawn from the policy of exactly `version`.

    Every generator has its share from the start, so that what an engine computes together is the same in every run.
    What a dead one had not finished goes to the others in equal shares, or waits for a newcomer if there are none.

    Raises:
        UserError: an impossible request, see `Engine.add`.
        WeightSyncError: a generator has another version.
        ActorFailure: a generator raised or did not answer in time, or too many died.
    """
    done: dict[int, PackedTrajectory] = {}
    waiting: Requests = dict(enumerate(requests))

    def finish(member: Member, finished: dict[int, PackedTrajectory]) -> None:
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
        members.ask(member, "advance", share, sampling, _SLICE_S, then=partial(finish, member), packed=True)

    generators.settle()
    members = Members([generators], died=lost)
    at_work = members.of[generators]
    try:
        while waiting or any(member.calls for member in at_work):
            members.add(generators, generators.welcome())
            if waiting and at_work:
                for member, share in zip(at_work, _shares(waiting, len(at_work)), strict=False):
                    give(member, share)
                waiting.clear()
            for member in members.hand_on(members.answers(_LOOK_S)):
                while member.held and len(member.calls) < QUEUE:
                    give(member, {})
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
