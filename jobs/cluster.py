"""Connecting to Ray, and the check before anything starts that the cluster can hold the run."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import ray
from ray._private import ray_constants
from ray._private.state import available_resources_per_node
from ray.autoscaler.sdk import request_resources
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.table import Table

from actors.pools.remote import ActorFailure
from actors.training.tasks import TRAIN_ENVIRONMENT
from jobs.ray_watch import ending_with_ray
from rayrlhf.config import Config
from rayrlhf.errors import UserError, one_line
from rayrlhf.machine import Machine, memory_of_gpus
from rayrlhf.runs.placement import Node, Plan, Role, demand, make_plan, roles_of, smaller
from rayrlhf.terminal import say

Answer = TypeVar("Answer")

_NOTICE_S, _POLL_S = 15.0, 1.0
"""Seconds between two lines for the user, and between two looks at the cluster, while nodes are waited for."""
_ANSWER_S = 120.0
"""Seconds in which all nodes must have answered what they are asked."""
_START_TRIES = 3
"""So often a private cluster is started before the run gives up."""
_NODES_IN_ERROR = 4
"""An error names so many nodes, and counts the others."""

# Set before Ray starts, so that every process of a local cluster inherits it.
LOCAL_ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",  # otherwise Ray writes a token file and later asks for it; see `loopback_only`
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_prestart_worker_first_driver": "0",  # one a core, which an actor with variables of its own cannot use
    "OMP_WAIT_POLICY": "passive",  # roles take turns on the same cores: threads that wait must not spin
}


def inside_job() -> bool:
    """Whether this process is the entry point of a `ray job submit`."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def has_cluster() -> bool:
    """Whether there is a cluster that a run would join: the job's, or the one that the user names."""
    return ray.is_initialized() or "RAY_ADDRESS" in os.environ  # set by the user, or by Ray for a job


@contextmanager
def loopback_only() -> Iterator[None]:
    """In the block, a Ray that starts or is joined listens on 127.0.0.1 alone, as it does on macOS.

    By default Ray listens on all addresses, and without a token anybody who reaches one of them can run code.
    Ray has this switch for macOS and Windows, and reads it when it is imported. It would turn a loopback address that
    it is given into another one.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER, os.environ.get(ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR)
    ray_constants.ENABLE_RAY_CLUSTER = False
    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"  # for the processes that are started
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before[0]
        if before[1] is None:
            del os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR]
        else:
            os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = before[1]


@contextmanager
def connected(config: Config) -> Iterator[None]:
    """One Ray connection for the block: the job's cluster, `RAY_ADDRESS`, or a private local one.

    A bare `ray.init()` could join a stranger's cluster on the same machine, so without an address it is `local`.
    Worker output stays in Ray's logs and dashboard; steps are shown by `jobs.follow`.
    """
    for key, value in TRAIN_ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    if ray.is_initialized():
        yield
        return
    local = not has_cluster()
    with loopback_only() if local else nullcontext():
        if local:
            for key, value in LOCAL_ENVIRONMENT.items():
                os.environ.setdefault(key, value)
            start_private(include_dashboard=config.resources.dashboard, logging_level="warning")
        else:
            ray.init(log_to_driver=False)
        try:
            with ending_with_ray() if local else nullcontext():
                yield
        finally:
            ray.shutdown()


def start_private(**options: Any) -> None:
    """Start a cluster of this machine. Ray gives its first node 30 s, which a very busy machine may exceed.

    Args:
        options: further arguments of `ray.init`.

    Raises:
        ActorFailure: it did not start in several tries.
    """
    for attempt in range(1, _START_TRIES + 1):
        try:
            ray.init(address="local", log_to_driver=False, **options)
            return
        except Exception as error:  # Ray raises nothing more specific
            if "timed out during startup" not in str(error):
                raise
            ray.shutdown()
            say(f"Ray did not start in time (try {attempt} of {_START_TRIES}): this machine is very busy")
    raise ActorFailure(f"Ray did not start in {_START_TRIES} tries: this machine is too busy; end something and go on")


def preflight(config: Config, runs: int = 1) -> Table:
    """Plan where the actors of a run go, or of `runs` runs at a time.

    It waits for nodes that are missing as long as the config says, and then for what other jobs hold.

    Raises:
        UserError: something fits nowhere: which role, what the cluster has, and what to set; or others hold too much.
    """
    roles, limit_s = roles_of(config.resources), config.resources.wait_for_nodes_s
    started = time.monotonic()
    plan = make_plan(roles, cluster_nodes(), runs)
    asked = not plan.complete and limit_s > 0
    bundles, labels = demand(plan)
    try:
        said = -math.inf
        while not plan.complete and (waited := time.monotonic() - started) < limit_s:
            if waited - said >= _NOTICE_S:
                said = waited
                # Of an autoscaler, if there is one. A cluster has one such request: that of another run, or its end,
                # takes the place of this one.
                request_resources(bundles=bundles, bundle_label_selectors=labels)
                say(f"waiting for nodes ({waited:.0f} of {limit_s} s): {_missing(plan)}")
            time.sleep(_POLL_S)
            plan = make_plan(roles, cluster_nodes(), runs)
    finally:
        if asked:
            request_resources(bundles=[])  # the request would outlive the run, and keep nodes that nobody uses
    if not plan.complete:
        raise UserError(_shortage(roles, plan, cluster_nodes(), runs))
    return plan_table(_wait_for_others(roles, runs, config.resources.start_timeout_s))


def _wait_for_others(roles: Sequence[Role], runs: int, limit_s: float) -> Plan:
    """The plan over what other jobs leave free, once the actors fit there.

    Without it, Ray would let them wait in silence until they count as dead.

    Raises:
        UserError: they do not fit in time.
    """
    started, said = time.monotonic(), -math.inf
    while not (plan := make_plan(roles, cluster_nodes(free=True), runs)).complete:
        waited = time.monotonic() - started
        if waited >= limit_s:
            raise UserError(
                f"placement: other jobs hold so much of the cluster that {_missing(plan)} after {limit_s:g} s; "
                f"end them (`ray list actors` names theirs), or wait longer: resources.start_timeout_s={10 * limit_s:g}"
            )
        if waited - said >= _NOTICE_S:
            said = waited
            say(f"waiting for other jobs ({waited:.0f} of {limit_s:g} s): {_missing(plan)}")
        time.sleep(_POLL_S)
    return plan


def cluster_nodes(free: bool = False) -> list[Node]:
    """The nodes that are alive, with all their resources, or with those that nobody holds now if `free`."""
    left = available_resources_per_node() if free else {}
    nodes = []
    for node in ray.nodes():
        if node["Alive"]:
            # A node that has just come is not in the list of what is left yet.
            resources = left.get(node["NodeID"], node["Resources"])
            cpus, gpus = resources.get("CPU", 0.0), resources.get("GPU", 0.0)
            nodes.append(Node(node["NodeManagerHostname"], cpus, gpus, node["Labels"]))
    return nodes


def cluster_machines() -> list[Machine]:
    """What the nodes have that are alive and have a CPU, whoever holds it now."""
    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
    with_gpus = [node["NodeID"] for node in nodes if node["Resources"].get("GPU", 0)]
    memory = dict(zip(with_gpus, ask_nodes(memory_of_gpus, with_gpus), strict=True))
    machines = []
    for node in nodes:
        has, own = node["Resources"], node["NodeID"]
        machine = Machine(int(has["CPU"]), int(has.get("GPU", 0)), has.get("memory", math.inf))
        machines.append(machine._replace(gpu_memory=memory[own]) if own in memory else machine)
    return machines


def ask_nodes(ask: Callable[[], Answer], nodes: Sequence[str]) -> list[Answer]:
    """What a function returns on each of these nodes, by their ids. Ray itself does not know what memory GPUs have.

    Raises:
        ActorFailure: a node does not answer.
    """
    task = ray.remote(num_cpus=0)(ask)
    strategies = [NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes]
    try:
        return ray.get([task.options(scheduling_strategy=each).remote() for each in strategies], timeout=_ANSWER_S)
    except ray.exceptions.RayError as error:
        raise ActorFailure(f"a node did not answer what it has: {one_line(error)[:200]}") from error


def plan_table(plan: Plan) -> Table:
    """The plan as a table: a row for each role, with the nodes that its actors are on."""
    table = Table(title="placement", title_justify="left")
    for heading in ("role", "count", "CPUs each", "GPUs each", "labels", "nodes"):
        table.add_column(heading, justify="left" if heading in ("role", "labels", "nodes") else "right")
    for role in plan.roles:
        nodes = ", ".join(f"{name} × {count}" for name, count in plan.placed[role.name].items())
        table.add_row(role.name, str(role.count), f"{role.cpus:g}", f"{role.gpus:g}", _pairs(role.labels) or "–", nodes)
    return table


def _missing(plan: Plan) -> str:
    return ", ".join(f"{count} {role.name}" for role in plan.roles if (count := plan.missing(role))) + " fit nowhere"


def _shortage(roles: Sequence[Role], plan: Plan, nodes: Sequence[Node], runs: int) -> str:
    """One sentence about the first role that does not fit; it ends with what to set, if a smaller run fits."""
    index = next(i for i, role in enumerate(plan.roles) if plan.missing(role))
    role = plan.roles[index]
    labels = _pairs(role.labels)
    usable = [n for n in nodes if all(n.labels.get(k) == v for k, v in role.labels.items())]
    has = [f"{n.name} {_size(n.cpus, n.gpus)}" for n in usable[:_NODES_IN_ERROR]]
    if len(usable) > _NODES_IN_ERROR:
        has.append(f"{len(usable) - _NODES_IN_ERROR} more")
    before = [f"{r.name} {r.count} x {_size(r.cpus, r.gpus)}" for r in plan.roles[:index]]
    number = "workers" if role.name == "learner" else "count"
    kind = "gpus" if role.gpus else "cpus"
    sentence = (
        f"resources.{role.name}: {plan.missing(role)} of {role.count} (each {_size(role.cpus, role.gpus)}) fit nowhere",
        f"nodes{f' with {labels}' if labels else ''}: {', '.join(has) or 'none'}",
        *([f"placed before: {', '.join(before)}"] if before else []),
        "add nodes (resources.wait_for_nodes_s waits for them), or lower "
        f"{'concurrent, ' if runs > 1 else ''}resources.{role.name}.{number} or resources.{role.name}.{kind}",
    )
    words = smaller(roles, nodes, runs)
    return "; ".join(sentence) + (f", for example: {' '.join(words)}" if words else "")


def _size(cpus: float, gpus: float) -> str:
    return f"{cpus:g} CPUs" + (f" + {gpus:g} GPUs" if gpus else "")


def _pairs(labels: Mapping[str, str]) -> str:
    return ", ".join(f"{key}={value}" for key, value in labels.items())
