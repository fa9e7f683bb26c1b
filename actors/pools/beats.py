"""An actor's sign of life: a side thread of its process writes a beat into Ray's key-value store every few seconds.

It needs nothing of the work thread, which may be in one call for minutes. So no beat comes only from a process that is
stopped, that holds Python's lock, or whose machine is gone. A beat also says how often the work thread has moved, so
that a call which takes long can be told from one that hangs.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import NamedTuple

import ray
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_put, internal_kv_get_gcs_client

_NAMESPACE = b"rayrlhf-beats"
_ANSWER_S = 5.0
"""Ray's store may take so long to answer."""
_stacks: list[int] = []
"""The file for the stacks of this process, see `begin_beats`."""


class Beat(NamedTuple):
    number: int
    """Rises with every beat."""
    moves: int
    """Rises with every beat before which the work thread was at another place, or has used the CPU."""
    pid: int
    thread: int
    """The operating system's id of the work thread."""
    node: str
    """Ray's id of the node."""
    stacks: tuple[int, str]
    """A file descriptor of the process, to which SIGUSR1 makes it write its stacks, and the name of the file."""


def begin_beats(key: str, every_s: float) -> None:
    """Beat under `key` from a thread, as long as this process lives. The caller's thread is the one that works."""
    descriptor, name = tempfile.mkstemp(prefix="rayrlhf-stacks-")
    os.unlink(name)  # /proc/PID/fd leads to it for as long as the process lives
    _stacks.append(descriptor)
    faulthandler.register(signal.SIGUSR1, file=descriptor, all_threads=True)
    arguments = (key, every_s, threading.get_ident(), threading.get_native_id(), (descriptor, name))
    threading.Thread(target=_beat, args=arguments, name="heartbeat", daemon=True).start()


def _beat(key: str, every_s: float, thread: int, native: int, stacks: tuple[int, str]) -> None:
    node = str(ray.get_runtime_context().get_node_id())
    clock = time.pthread_getcpuclockid(thread)
    number = moves = 0
    before = _place(thread), _cpu_ns(clock)
    while True:
        now = _place(thread), _cpu_ns(clock)  # a thread that only waits takes no CPU time at all
        moves, number, before = moves + (now != before), number + 1, now
        beat = json.dumps(Beat(number, moves, os.getpid(), native, node, stacks)).encode()
        with contextlib.suppress(Exception):  # Ray's store is out of reach for a while: that is for others to find
            _internal_kv_put(key, beat, overwrite=True, namespace=_NAMESPACE)
        time.sleep(every_s)


def _cpu_ns(clock: int) -> int:
    try:
        return time.clock_gettime_ns(clock)
    except OSError:
        return 0  # the thread has ended: that of a learner rank does when a loop raises


def _place(thread: int) -> int:
    """What the thread is at, from the innermost call outwards."""
    frame: FrameType | None = sys._current_frames().get(thread)
    places = []
    while frame is not None:
        places.append((id(frame.f_code), frame.f_lasti))
        frame = frame.f_back
    return hash(tuple(places))


# ---- for those who look


def read_beats(keys: Sequence[str]) -> Mapping[str, Beat] | None:
    """The newest beat under each key that has any; None if Ray's store does not answer."""
    try:
        found = internal_kv_get_gcs_client().internal_kv_multi_get(
            [key.encode() for key in keys], namespace=_NAMESPACE, timeout=_ANSWER_S
        )
    except Exception:
        return None
    return {key.decode(): _parsed(value) for key, value in found.items()}


def _parsed(value: bytes) -> Beat:
    number, moves, pid, thread, node, (descriptor, name) = json.loads(value)
    return Beat(number, moves, pid, thread, node, (descriptor, name))


def forget_beats(key: str) -> None:
    """Remove what an actor that is gone has left in Ray's store."""
    with contextlib.suppress(Exception):
        _internal_kv_del(key, namespace=_NAMESPACE)
