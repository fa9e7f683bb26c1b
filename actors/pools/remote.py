"""One way to call an actor, whether it is a Ray actor or an object in this process (`--local`).

Every wait has a time-out, and its error names the actor, the method and what to look at.
"""

from __future__ import annotations

import pickle
import platform
import re
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, NoReturn

import ray
from ray.exceptions import (
    ActorUnavailableError,
    GetTimeoutError,
    ObjectLostError,
    RayActorError,
    RayError,
    RayTaskError,
)

from actors.pools.beats import begin_beats
from rayrlhf.config import Config
from rayrlhf.errors import PlainError, UserError, one_line, without_colour
from rayrlhf.failures import cause, cause_of, last_error, with_remedy

_RESTART_LOOK_S = 0.5
"""Between two looks whether Ray has started an actor again."""


def this_node() -> str:
    """The id of the Ray node that this process is on, or the machine's name without Ray."""
    return str(ray.get_runtime_context().get_node_id()) if ray.is_initialized() else platform.node()


def namespace(config: Config) -> str:
    """The namespace of a run's actors. Every run has a `coordinator`; the namespace keeps those of one cluster apart.

    `config.runs_dir` is resolved (see `jobs.session.opened`): two users may both have typed `runs`.
    """
    return f"rayrlhf-{config.runs_dir}/{config.name}"


_DEATHS = (
    (r"killed by `ray\.kill`", "it was ended by ray.kill"),
    (r"low on memory|memory monitor", "Ray ended it because its node was low on memory"),
    (r"node has died|node was (preempted|terminated)", "its node is gone"),
    (r"owner has died", "the process that owns it is gone"),
    (r"actor (is restarting|was restarted)", "its process had ended before"),
    (
        r"SIGKILL|SIGSEGV|connection error code 2|temporarily unavailable: RpcError",
        "its process ended at once: kill -9, a crash, or out of memory, which `dmesg` tells",
    ),
)
"""Patterns of Ray's words for the death of an actor, and plain ones."""


class ActorFailure(PlainError):
    """An actor died during a call, did not answer it in time, or raised; the message names actor and method."""


class ActorLate(ActorFailure):
    """The actor did not answer in time. It may be slow, or hang."""


class ActorDied(ActorFailure):
    """The actor's process is gone. Another actor may do its work."""


class ActorWedged(ActorDied):
    """The actor's process is there and gets nowhere. It is killed, and counts as dead."""


class CouldNotStart(ActorDied):
    """The actor's constructor raised. Another one may have more luck, but hardly if it ends with the same words."""


class Restarted(Exception):
    """Raised by an actor that Ray has started again, and that does not know what it was told before its death."""


@dataclass(frozen=True, eq=False)
class Call:
    """A call that an actor works on (Ray), or that is already done (local)."""

    actor: str
    method: str
    ref: Any
    """The ObjectRef of the answer; the answer itself if `local`."""
    local: bool
    started: float
    """`time.monotonic()` before the call."""
    serialized: bool = False
    """Whether the answer is one string of bytes, see `SerializedCalls`."""

    def future(self) -> Future[Any]:
        """A future of the answer, to be read by `answer`. Its callbacks run in a thread of Ray's."""
        if not self.local:
            return self.ref.future()
        done: Future[Any] = Future()
        done.set_result(self.ref)
        return done


class Remote:
    """Handle to one actor. `submit` starts a call, `wait` fetches results, `call` does both."""

    def __init__(self, name: str, target: Any, local: bool) -> None:
        self.name = name
        self._target = target
        self.local = local

    @classmethod
    def spawn(
        cls,
        name: str,
        actor_class: type,
        *args: Any,
        local: bool,
        options: dict[str, Any] | None = None,
        concurrency_groups: dict[str, int] | None = None,
        **kwargs: Any,
    ) -> Remote:
        """Create `actor_class(*args, **kwargs)`: in this process if `local`, otherwise as a Ray actor named `name`.

        Calls of one caller run one after the other, in their order. Only calls of another concurrency group run beside
        them.

        Args:
            options: for `ray.remote(...).options`.
            concurrency_groups: names, and how many calls of each group may run at the same time.
        """
        if local:
            return cls(name, actor_class(*args, **kwargs), True)
        remote_class = ray.remote(concurrency_groups=concurrency_groups or {})(actor_class)
        handle = remote_class.options(name=name, **(options or {})).remote(*args, **kwargs)
        return cls(name, handle, False)

    def submit(self, method: str, *args: Any, **kwargs: Any) -> Call:
        """Start a call. A local object does the work before this returns, and what it raises is raised here."""
        started = time.monotonic()
        bound = getattr(self._target, method)
        ref = bound(*args, **kwargs) if self.local else bound.remote(*args, **kwargs)
        return Call(self.name, method, ref, self.local, started)

    def submit_beside(self, group: str, method: str, *args: Any) -> Call:
        """Start a call of a concurrency group, which does not wait for the calls of others."""
        if self.local:
            return self.submit(method, *args)
        started = time.monotonic()
        ref = getattr(self._target, method).options(concurrency_group=group).remote(*args)
        return Call(self.name, method, ref, False, started)

    def submit_serialized(self, method: str, *args: Any) -> Call:
        """Start a call for less CPU time, see `SerializedCalls`. The arguments must hold no ObjectRef."""
        if self.local:
            return self.submit(method, *args)
        started = time.monotonic()
        ref = self._target.serialized_call.remote(dump((method, args)))
        return Call(self.name, method, ref, False, started, serialized=True)

    def call(self, method: str, *args: Any, timeout_s: float, **kwargs: Any) -> Any:
        """Call and wait for the result; raises what `wait` raises."""
        return wait([self.submit(method, *args, **kwargs)], timeout_s)[0]

    def wait_until_back(self, timeout_s: float) -> None:
        """Return when an actor answers that has died and has `max_restarts`; raises what `wait` raises."""
        started = time.monotonic()
        while True:
            # Ray could repeat the call by itself, and would write a line into the terminal each time.
            call = Call(self.name, "start", self._target.__ray_ready__.remote(), False, time.monotonic())
            try:
                wait([call], timeout_s)
                return
            except ActorDied as death:
                if not isinstance(death.__cause__, ActorUnavailableError):  # it is gone for good
                    raise
                if time.monotonic() - started > timeout_s:
                    raise late(call, timeout_s) from death
            time.sleep(_RESTART_LOOK_S)

    def kill(self) -> None:
        """End the actor now; does nothing for a local object."""
        if not self.local:
            ray.kill(self._target)


def wait(calls: Sequence[Call], timeout_s: float) -> list[Any]:
    """Results of all calls, in order.

    Raises:
        UserError: raised by the actor itself, passed on unchanged.
        ActorFailure: an actor died, raised, or did not answer within `timeout_s` (of all calls together).
    """
    deadline = time.monotonic() + timeout_s
    results = []
    for call in calls:
        if call.local:
            results.append(call.ref)
            continue
        try:
            value = ray.get(call.ref, timeout=max(0.0, deadline - time.monotonic()))
        except GetTimeoutError:
            raise late(call, timeout_s) from None
        except (RayActorError, ObjectLostError, RayTaskError) as error:
            _fail(call, error)
        results.append(load(value) if call.serialized else value)
    return results


def answer(call: Call, future: Future[Any]) -> Any:
    """The result behind a future of `call` that is done; raises what `wait` raises."""
    try:
        value = future.result()
    except (RayActorError, ObjectLostError, RayTaskError) as error:
        _fail(call, error)
    return load(value) if call.serialized else value


def _fail(call: Call, error: Exception) -> NoReturn:
    # A RayTaskError may be one of these classes as well: the method itself got it, from an actor that it called.
    if isinstance(error, RayActorError | ObjectLostError) and not isinstance(error, RayTaskError):
        if getattr(error, "actor_init_failed", False):
            kind, words = last_error(without_colour(str(error)))
            if kind == UserError.__name__:
                raise UserError(words) from None
            raise CouldNotStart(f"{call.actor} could not start: {with_remedy(cause(kind, words))}") from error
        raise ActorDied(f"{call.actor} died during {call.method}: {death_of(error)}") from error
    raised = getattr(error, "cause", error)
    if isinstance(raised, Restarted):
        raise ActorDied(f"{call.actor} died before {call.method}: its process ended and nobody waited for it") from None
    if isinstance(raised, UserError):
        raise UserError(str(raised)) from None
    if isinstance(raised, ActorFailure):  # about an actor that this actor called: its message names that one
        raise ActorFailure(str(raised)) from error
    if type(raised) is RayError:  # in place of an error that cannot be sent
        said = cause(*last_error(error.traceback_str)) if isinstance(error, RayTaskError) else cause_of(raised)
    else:
        said = cause_of(raised)
    raise ActorFailure(f"{call.actor}.{call.method} raised {with_remedy(said)}") from error


def death_of(error: Exception) -> str:
    """Why an actor died, by Ray's words for it."""
    words = one_line(error)
    # The reason stands at the end of Ray's words.
    return next((plain for pattern, plain in _DEATHS if re.search(pattern, words)), words[-300:])


def late(call: Call, timeout_s: float) -> ActorLate:
    """The error for a call that has not answered in time."""
    return ActorLate(
        f"{call.actor}.{call.method} did not answer within {timeout_s:.0f} s; see its log in the Ray dashboard "
        "(a slow machine needs a larger resources.call_timeout_s or resources.start_timeout_s)"
    )


def dump(value: Any) -> bytes:
    return pickle.dumps(value, protocol=5)


def load(message: bytes) -> Any:
    return pickle.loads(message)


class SerializedCalls:
    """Base class of actors whose methods can also be called by one string of bytes, which they answer with another.

    It is cheaper: Ray passes bytes on unchanged, while ordinary arguments cost the caller 0.1 ms a call. Ray pickles
    those by Python code that looks for functions and classes to send along.
    """

    def serialized_call(self, message: bytes) -> bytes:
        method, args = load(message)
        return dump(getattr(self, method)(*args))

    def begin_beats(self, key: str, every_s: float) -> None:
        """Give signs of life from now on, see `actors.pools.heartbeat`."""
        begin_beats(key, every_s)


def put(value: Any, local: bool) -> Any:
    """Store a value for several readers: in the object store, one copy a node; if `local`, return the value itself."""
    return value if local else ray.put(value)


def fetch(reference: Any) -> Any:
    """The value behind `put`'s result."""
    return ray.get(reference, timeout=600) if isinstance(reference, ray.ObjectRef) else reference
