"""One way to call an actor, whether it is a Ray actor or an object in this process (`--local`).

Every wait has a time-out, and its error names the actor, the method and what to look at.
"""

from __future__ import annotations

import pickle
import platform
import time
from collections.abc import Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, NoReturn

import ray
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, RayTaskError

from rayrlhf.config import Config
from rayrlhf.errors import UserError, one_line


def this_node() -> str:
    """The id of the Ray node that this process is on, or the machine's name without Ray."""
    return str(ray.get_runtime_context().get_node_id()) if ray.is_initialized() else platform.node()


def namespace(config: Config) -> str:
    """The namespace of a run's actors. Every run has a `coordinator`; the namespace keeps those of one cluster apart.

    `config.runs_dir` is resolved (see `jobs.session.opened`): two users may both have typed `runs`.
    """
    return f"rayrlhf-{config.runs_dir}/{config.name}"


class ActorFailure(RuntimeError):
    """A remote call died, timed out or raised; the message names the actor and the method."""


class ActorDied(ActorFailure):
    """The actor's process is gone; another one may do the work."""


@dataclass(frozen=True, eq=False)
class Call:
    """A call under way (Ray) or already done (local)."""

    actor: str
    method: str
    ref: Any
    local: bool
    started: float
    """`time.monotonic()` before the call."""
    serialized: bool = False
    """Whether the answer is one string of bytes, see `SerializedCalls`."""

    def future(self) -> Future[Any]:
        """Done when the call is, for `answer`; its callbacks run in a thread of Ray's."""
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
        """Create `actor_class(*args, **kwargs)`: in this process if `local`, else as a Ray actor named `name`.

        Calls run one after the other in the order in which one caller made them; those of a concurrency group
        (of that many threads) beside the others.
        """
        if local:
            return cls(name, actor_class(*args, **kwargs), True)
        remote_class = ray.remote(concurrency_groups=concurrency_groups or {})(actor_class)
        handle = remote_class.options(name=name, **(options or {})).remote(*args, **kwargs)
        return cls(name, handle, False)

    def submit(self, method: str, *args: Any, **kwargs: Any) -> Call:
        started = time.monotonic()
        bound = getattr(self._target, method)
        ref = bound(*args, **kwargs) if self.local else bound.remote(*args, **kwargs)
        return Call(self.name, method, ref, self.local, started)

    def submit_serialized(self, method: str, *args: Any) -> Call:
        """The same for less, see `SerializedCalls`; the arguments hold no ObjectRef."""
        if self.local:
            return self.submit(method, *args)
        started = time.monotonic()
        ref = self._target.serialized_call.remote(dump((method, args)))
        return Call(self.name, method, ref, False, started, serialized=True)

    def call(self, method: str, *args: Any, timeout_s: float, **kwargs: Any) -> Any:
        return wait([self.submit(method, *args, **kwargs)], timeout_s)[0]

    def kill(self) -> None:
        """End the actor now; does nothing for a local object."""
        if not self.local:
            ray.kill(self._target)


def wait(calls: Sequence[Call], timeout_s: float) -> list[Any]:
    """Results of all calls, in order.

    Raises:
        UserError: raised by the actor itself, passed on as it is.
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
    # What the call raised may be such an error as well, of an actor or an object that it asked for.
    if isinstance(error, RayActorError | ObjectLostError) and not isinstance(error, RayTaskError):
        cause = one_line(error)[-600:]  # the reason stands at the end
        raise ActorDied(f"{call.actor} died during {call.method}: {cause}") from error
    raised = getattr(error, "cause", None)
    if isinstance(raised, UserError):
        raise UserError(str(raised)) from None
    if isinstance(raised, ActorFailure):  # of an actor that the called one called: its line says it all
        raise ActorFailure(str(raised)) from error
    raise ActorFailure(f"{call.actor}.{call.method} raised {error}") from error


def finished(calls: Collection[Call], timeout_s: float) -> list[Call]:
    """The calls that are finished, well or badly, in their order; waits up to `timeout_s` for the first one."""
    if any(call.local for call in calls):
        return [call for call in calls if call.local]
    refs = [call.ref for call in calls]
    done, rest = ray.wait(refs, num_returns=1, timeout=max(0.0, timeout_s), fetch_local=False)
    if done and rest:
        done += ray.wait(rest, num_returns=len(rest), timeout=0, fetch_local=False)[0]
    found = set(done)
    return [call for call in calls if call.ref in found]


def late(call: Call, timeout_s: float) -> ActorFailure:
    """The error for a call that has not answered in time."""
    return ActorFailure(
        f"{call.actor}.{call.method} did not answer within {timeout_s:.0f} s; see its log in the Ray dashboard "
        "(a slow machine needs a larger resources.call_timeout_s or resources.start_timeout_s)"
    )


def dump(value: Any) -> bytes:
    return pickle.dumps(value, protocol=5)


def load(message: bytes) -> Any:
    return pickle.loads(message)


class SerializedCalls:
    """An actor whose methods can be called with all their arguments in one string of bytes, and then answer with one.

    Ray passes bytes on as they are. Arguments of their own cost the caller 0.1 ms a call: each is pickled by Python
    code that looks for functions and classes to send along.
    """

    def serialized_call(self, message: bytes) -> bytes:
        method, args = load(message)
        return dump(getattr(self, method)(*args))


def put(value: Any, local: bool) -> Any:
    """Store a value for several readers: one object-store copy a node, or the value itself."""
    return value if local else ray.put(value)


def fetch(reference: Any) -> Any:
    """The value behind `put`'s result."""
    return ray.get(reference, timeout=600) if isinstance(reference, ray.ObjectRef) else reference
