"""Where the actors of a run fit: a plan over the nodes of a cluster, made before anything starts.

It mirrors how Ray places them: by labels, whole and fractional GPUs, learners kept together, generators and scorers
spread. It takes the nodes as if they were empty: for what other jobs hold, Ray waits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rayrlhf.config_resources import ResourcesConfig

_ROUNDING = 1e-6
"""Fractions of a GPU are added up in floating point."""


@dataclass(frozen=True)
class Role:
    """Actors that ask for the same: `count` of them, each with these CPUs and GPUs, on nodes that have `labels`."""

    name: str
    """Its section in `resources`."""
    count: int
    cpus: float
    gpus: float
    """Whole ones, or a fraction of one."""
    labels: Mapping[str, str]
    together: bool
    """As many as possible on one node; otherwise on as many nodes as possible."""


@dataclass(frozen=True)
class Node:
    """A machine of the cluster, as Ray counts its resources."""

    name: str
    cpus: float
    gpus: float
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """Which node holds how many actors of each role."""

    roles: Sequence[Role]
    placed: Mapping[str, Counter[str]]
    """Role to node to number of actors."""

    def missing(self, role: Role) -> int:
        """How many actors of the role fit nowhere."""
        return role.count - self.placed[role.name].total()

    @property
    def complete(self) -> bool:
        return not any(self.missing(role) for role in self.roles)


class _Free:
    """What is left of a node."""

    def __init__(self, node: Node) -> None:
        self.node, self.cpus = node, node.cpus
        self.gpus = [1.0] * int(node.gpus)
        self.held = 0

    def takes(self, role: Role) -> bool:
        """Take one actor of the role if it fits; a fraction of a GPU has to come from one GPU."""
        if self.cpus + _ROUNDING < role.cpus or any(self.node.labels.get(k) != v for k, v in role.labels.items()):
            return False
        share, whole = (role.gpus, 1) if role.gpus < 1 else (1.0, int(role.gpus))
        # The fullest GPU that has room, so that whole ones are left for those that need them.
        fitting = sorted((free, i) for i, free in enumerate(self.gpus) if free + _ROUNDING >= share)[:whole]
        if role.gpus and len(fitting) < whole:
            return False
        if role.gpus:
            for _, i in fitting:
                self.gpus[i] -= share
        self.cpus -= role.cpus
        self.held += 1
        return True


def roles_of(resources: ResourcesConfig) -> list[Role]:
    """The roles of a run, in the order in which they are placed: the one that stays together has the first choice."""
    learner, generators, scorers = resources.learner, resources.generators, resources.scorers
    return [
        Role("learner", learner.workers, learner.cpus, learner.gpus, learner.labels, together=True),
        Role("generators", generators.count, generators.cpus, generators.gpus, generators.labels, together=False),
        Role("scorers", scorers.count, scorers.cpus, scorers.gpus, scorers.labels, together=False),
    ]


def make_plan(roles: Sequence[Role], nodes: Sequence[Node], runs: int = 1) -> Plan:
    """Place the actors of `runs` runs; those that fit nowhere are missing in the plan."""
    free = [_Free(node) for node in nodes]
    roles = [Role(r.name, runs * r.count, r.cpus, r.gpus, r.labels, r.together) for r in roles]
    placed: dict[str, Counter[str]] = {}
    for role in roles:
        placed[role.name] = Counter()
        for each in free:
            each.held = 0
        for _ in range(role.count):
            # The learner goes where it already is, the others where fewest of their kind are. Of equal nodes, the one
            # with the most free GPUs, then CPUs; of these, the one that was listed first.
            order = sorted(free, key=lambda f: (-f.held if role.together else f.held, -sum(f.gpus), -f.cpus))
            taken = next((f for f in order if f.takes(role)), None)
            if taken is None:
                break
            placed[role.name][taken.node.name] += 1
    return Plan(roles, placed)


def demand(plan: Plan) -> tuple[list[dict[str, float]], list[dict[str, str]]]:
    """The resources and the labels of every actor of the plan, placed or not, as an autoscaler is asked for them."""
    bundles, labels = [], []
    for role in plan.roles:
        bundle = {kind: amount for kind, amount in (("CPU", role.cpus), ("GPU", role.gpus)) if amount}
        if bundle:
            bundles += [bundle] * role.count
            labels += [dict(role.labels)] * role.count
    return bundles, labels
