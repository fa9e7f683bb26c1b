"""A look at a run that is under way: its actors, as Ray and the run's coordinator know them."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.state import list_actors
from ray.util.state.exception import RayStateApiException

from actors.pools.monitoring import CONTROL, Status
from actors.pools.remote import namespace
from jobs.cluster import LOCAL_ENVIRONMENT, loopback_only
from rayrlhf.config import Config
from rayrlhf.errors import UserError

ANSWER_S = 20.0


@dataclass(frozen=True)
class LiveActor:
    """An actor of the run. Each of Ray Train's workers is called `learner`."""

    name: str
    state: str
    """In Ray's words: ALIVE, PENDING_CREATION, RESTARTING."""
    node: str
    pid: int | None
    """None until it has a process."""


@dataclass(frozen=True)
class Live:
    address: str
    """Of the cluster."""
    status: Status
    actors: tuple[LiveActor, ...]
    """Empty without Ray's dashboard, which keeps the list."""


def read_live(address: str, config: Config) -> Live:
    """Ask the run's coordinator, and Ray for the actors of its job.

    Raises:
        UserError: the cluster cannot be reached, or no coordinator of this run is on it.
    """
    with _coordinator(address, config) as coordinator:
        status = _ask(coordinator.status, address)
        return Live(address, status, tuple(_actors(address, coordinator._actor_id.hex(), namespace(config))))


def scale_live(address: str, config: Config, generators: int | None, scorers: int | None) -> dict[str, int]:
    """Have the run's coordinator grow or shrink its pools; returns how many there are to be, by role.

    Raises:
        UserError: what `read_live` and `Coordinator.scale` raise.
    """
    with _coordinator(address, config) as coordinator:
        wanted: dict[str, int] = _ask(coordinator.scale, address, generators, scorers)
        return wanted


@contextmanager
def _coordinator(address: str, config: Config) -> Iterator[Any]:
    with _joined(address):
        try:
            coordinator = ray.get_actor("coordinator", namespace=namespace(config))
        except ValueError:
            raise UserError(f"no coordinator of run {config.name!r} is on the cluster at {address}") from None
        yield coordinator


def _ask(method: Any, address: str, *args: Any) -> Any:
    try:
        return ray.get(method.options(concurrency_group=CONTROL).remote(*args), timeout=ANSWER_S)
    except RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise UserError(str(error.cause)) from None
        raise
    except RayError as error:
        raise UserError(f"the coordinator at {address} does not answer ({type(error).__name__})") from None


def _actors(address: str, coordinator: str, own: str) -> Iterator[LiveActor]:
    """The actors in the namespace `own`, by name, then the workers of Ray Train in the coordinator's job."""
    try:
        found = list_actors(address, limit=10_000, timeout=int(ANSWER_S))
    except (RayStateApiException, OSError, RuntimeError):
        return  # there is no dashboard
    job = next((actor.job_id for actor in found if actor.actor_id == coordinator), None)
    alive = [actor for actor in found if actor.job_id == job and actor.state != "DEAD"]
    named = sorted((actor for actor in alive if actor.ray_namespace == own), key=lambda actor: actor.name)
    workers = [actor for actor in alive if actor.class_name == "RayTrainWorker"]
    for name, actor in [*((actor.name, actor) for actor in named), *(("learner", actor) for actor in workers)]:
        yield LiveActor(name, actor.state, (actor.node_id or "")[:8], actor.pid)


@contextmanager
def _joined(address: str) -> Iterator[None]:
    """Connect to a running cluster within the block, and leave nothing behind."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    try:
        # Ray itself would go on trying for minutes.
        socket.create_connection((host, int(port)), timeout=3).close()
    except (OSError, ValueError):
        raise UserError(f"no Ray cluster answers at {address}; give its address as host:port (--address)") from None
    own = host == "127.0.0.1"  # of `jobs.cluster.connected`; any other asks for tokens as its environment says
    if own:
        for key, value in LOCAL_ENVIRONMENT.items():
            os.environ.setdefault(key, value)
    with loopback_only() if own else nullcontext():
        try:
            ray.init(address=address, log_to_driver=False, logging_level="error")
        except (RayError, ConnectionError, RuntimeError, ValueError) as error:
            raise UserError(f"cannot join the Ray cluster at {address}: {' '.join(str(error).split())[:300]}") from None
        try:
            yield
        finally:
            ray.shutdown()
