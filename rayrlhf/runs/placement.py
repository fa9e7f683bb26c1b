"""Where the actors of a run fit: a plan over the nodes of a cluster, made before anything starts.

It mirrors how Ray places them: by labels, whole and fractional GPUs, learners kept together, generators and scorers
spread. Of a node it is given all resources, to see whether a run fits at all, or what other jobs leave free of them.
"""

from __future__ import annotations

import bisect
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from rayrlhf.config_resources import ResourcesConfig

_ROUNDING = 1e-6
"""Fractions of a GPU are added up in floating point."""
_SHRINK, _SMALLEST = 0.9, 0.1
"""Shares of CPUs and GPUs are tried in steps of this factor, down to this share of what was asked for."""


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
        whole = int(node.gpus + _ROUNDING)
        self.gpus = [1.0] * whole + ([node.gpus - whole] if node.gpus - whole > _ROUNDING else [])
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


def smaller(roles: Sequence[Role], nodes: Sequence[Node], runs: int = 1) -> list[str]:
    """What to set, as `resources.learner.cpus=0.5`, so that roles that do not fit these nodes do; nothing if no smaller
    count or share does.

    Counts are lowered first: they cost time only. Shares say how many actors are on a node or GPU together.
    """

    def fits(tried: list[Role]) -> bool:
        return make_plan(tried, nodes, runs).complete

    def at_most(count: int) -> list[Role]:
        return [replace(role, count=min(role.count, count)) for role in roles]

    most = bisect.bisect_left(range(1, max(r.count for r in roles)), True, key=lambda n: not fits(at_most(n)))
    tried = [at_most(most)] if most else []
    share = _SHRINK
    while share >= _SMALLEST:
        # Several whole GPUs are what a model needs; a part of them is no share.
        tried.append([
            replace(role, cpus=_cut(role.cpus * share), gpus=_cut(role.gpus * share) if role.gpus <= 1 else role.gpus)
            for role in roles
        ])  # fmt: skip
        share *= _SHRINK
    found = next(filter(fits, tried), [])
    return [word for old, new in zip(roles, found, strict=False) for word in _settings(old, new)]


def _cut(amount: float) -> float:
    """Hundredths, at least one of what is not 0: without GPUs an actor would do its work on a CPU."""
    return max(1, math.floor(100 * amount)) / 100 if amount else 0.0


def _settings(old: Role, new: Role) -> Iterator[str]:
    count = "workers" if old.together else "count"
    for key, before, after in (
        (count, old.count, new.count), ("cpus", old.cpus, new.cpus), ("gpus", old.gpus, new.gpus),
    ):  # fmt: skip
        if before != after:
            yield f"resources.{old.name}.{key}={after:g}"


def demand(plan: Plan) -> tuple[list[dict[str, float]], list[dict[str, str]]]:
    """The resources and the labels of every actor of the plan, placed or not, as an autoscaler is asked for them."""
    bundles, labels = [], []
    for role in plan.roles:
        bundle = {kind: amount for kind, amount in (("CPU", role.cpus), ("GPU", role.gpus)) if amount}
        if bundle:
            bundles += [bundle] * role.count
            labels += [dict(role.labels)] * role.count
    return bundles, labels
