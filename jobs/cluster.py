"""Connecting to Ray, and the check before anything starts that the cluster can hold the run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from actors.train import TRAIN_ENVIRONMENT
from rayrlhf.config import Config
from rayrlhf.errors import UserError

# Set before Ray starts, so that every process of a local cluster inherits it.
LOCAL_ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",  # a loopback cluster; otherwise Ray writes a token file and later asks for it
    "RAY_USAGE_STATS_ENABLED": "0",
    "OMP_WAIT_POLICY": "passive",  # roles take turns on the same cores: threads that wait must not spin
}


def inside_job() -> bool:
    """Whether this process is the entry point of a `ray job submit`."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


@contextmanager
def connected(config: Config) -> Iterator[None]:
    """One Ray connection for the block: the job's cluster, `RAY_ADDRESS`, or a private local one.

    A bare `ray.init()` could join a stranger's cluster on the same machine, so without an address it is `local`.
    Worker output stays in Ray's logs and dashboard; steps are shown by `jobs.follow`.
    """
    os.environ.update(TRAIN_ENVIRONMENT)
    if ray.is_initialized():
        yield
        return
    if "RAY_ADDRESS" in os.environ:  # set by the user, or by Ray for a job
        ray.init(log_to_driver=False)
    else:
        for key, value in LOCAL_ENVIRONMENT.items():
            os.environ.setdefault(key, value)
        ray.init(
            address="local",
            include_dashboard=config.resources.dashboard,
            log_to_driver=False,
            logging_level="warning",
        )
    try:
        yield
    finally:
        ray.shutdown()


def preflight(config: Config, runs: int = 1) -> None:
    """Compare what the run asks for, or `runs` of them at a time, with what the cluster has.

    Raises:
        UserError: one sentence that says what is missing and which key to change.
    """
    resources = config.resources
    roles = {
        "learner": (resources.learner.workers, resources.learner.cpus, resources.learner.gpus),
        "generators": (resources.generators.count, resources.generators.cpus, resources.generators.gpus),
        "scorers": (resources.scorers.count, resources.scorers.cpus, resources.scorers.gpus),
    }
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for kind, column in (("CPU", 1), ("GPU", 2)):
        needed = runs * sum(role[0] * role[column] for role in roles.values())
        present = sum(node.get(kind, 0.0) for node in nodes)
        largest = max((node.get(kind, 0.0) for node in nodes), default=0.0)
        if needed > present:
            parts = " + ".join(
                f"{name} {role[0]} x {role[column]:g}" for name, role in roles.items() if role[0] * role[column]
            )
            who, lower = ("this run needs", "") if runs == 1 else (f"{runs} runs at a time need", "concurrent, ")
            raise UserError(
                f"{who} {needed:g} {kind}s ({parts}) and the cluster has {present:g}; add nodes, or lower {lower}"
                f"resources.*.count, resources.learner.workers or resources.*.{kind.lower()}s"
            )
        for name, role in roles.items():
            if role[column] > largest:
                raise UserError(
                    f"resources.{name}.{kind.lower()}s={role[column]:g} is more than any node has ({largest:g}); "
                    "lower it or add a larger node"
                )
