"""What a process that does not answer is at, and its end.

Whoever calls may be on any node: the work is done on that of the process.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.pools.beats import Beat
from actors.pools.remote import this_node

_PY_SPY_S = 15.0
_STACKS_S = 5.0
"""How long a process may take to write its own stacks."""
_NODE_S = 60.0
"""How long another node may take to answer."""
_STILL_S = 5.0
"""A thread that is not given the CPU once in so many seconds, and does not wait for it or for a disk, stands still."""


def examine_and_end(beat: Beat) -> str:
    """What the process of a beat is at, in many lines; then the process is killed. Never raises."""
    try:
        return _there(_examine_and_end, beat)
    except ray.exceptions.RayError as error:
        return f"its node does not answer: {type(error).__name__}"


def examine_if_still(beat: Beat) -> str:
    """What a silent process is at, if it is stopped or its work thread stands still; empty if nothing says so.

    One call that holds Python's lock keeps the beats back, however hard it works. Never raises.
    """
    try:
        return _there(_examine_if_still, beat)
    except ray.exceptions.RayError:
        return ""


def end(beat: Beat) -> None:
    """Kill the process of a beat, if it is there. Never raises."""
    with contextlib.suppress(ray.exceptions.RayError):
        _there(_end, beat)


def _there(function: Callable[[Beat], str], beat: Beat) -> str:
    """Call a function on the node of a beat's process."""
    if beat.node == this_node():
        return function(beat)
    there = NodeAffinitySchedulingStrategy(beat.node, soft=False)
    call = ray.remote(num_cpus=0)(function).options(scheduling_strategy=there).remote(beat)
    return str(ray.get(call, timeout=_NODE_S))


def _examine_and_end(beat: Beat) -> str:
    return _examine(beat) + _end(beat)


def _examine_if_still(beat: Beat) -> str:
    if not _is_there(beat):
        return ""
    before = _at_rest(beat)
    if before != _STOPPED:
        time.sleep(_STILL_S)
    return _examine(beat) if before and _at_rest(beat) == before else ""


def _examine(beat: Beat) -> str:
    if not _is_there(beat):
        return f"process {beat.pid} is gone"
    state = _line(r"State:\s*(.*)", f"/proc/{beat.pid}/status")
    waits = _line("(.*)", f"/proc/{beat.pid}/wchan") or "?"
    stacks = _by_py_spy(beat.pid) or _by_itself(beat, state) or "its stacks cannot be read"
    return f"process {beat.pid}: state {state}, waits in {waits}\n{stacks}"


def _end(beat: Beat) -> str:
    if _is_there(beat):
        with contextlib.suppress(ProcessLookupError):
            os.kill(beat.pid, signal.SIGKILL)  # Ray asks it to end first, which one that is stopped does not hear
    return ""


_STOPPED = "stopped"


def _at_rest(beat: Beat) -> str:
    """What changes whenever the work thread gets the CPU; empty if it wants the CPU, waits for a disk, or is gone."""
    thread = f"/proc/{beat.pid}/task/{beat.thread}"
    state = _line(r"State:\s*(\w)", f"{thread}/status")
    if state == "T":
        return _STOPPED
    return _line("(.*)", f"{thread}/schedstat") if state == "S" else ""


def _is_there(beat: Beat) -> bool:
    """Whether the pid is still that process, and not another one that has got its number."""
    descriptor, name = beat.stacks
    try:
        return os.readlink(f"/proc/{beat.pid}/fd/{descriptor}").startswith(name)
    except OSError:
        return False


def _by_py_spy(pid: int) -> str:
    """The stacks by py-spy; empty where it is not installed, or not allowed to look into another process."""
    program = shutil.which("py-spy") or shutil.which("py-spy", path=str(Path(sys.executable).parent))
    if program is None:
        return ""
    command = [program, "dump", "--nonblocking", "--pid", str(pid)]  # pausing one that is stopped would wait for ever
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PY_SPY_S)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _by_itself(beat: Beat, state: str) -> str:
    """The stacks as the process writes them at SIGUSR1, which works while another thread holds Python's lock."""
    if state.startswith("T"):
        return "it is stopped, and can be continued by SIGCONT only"
    path = Path(f"/proc/{beat.pid}/fd/{beat.stacks[0]}")
    try:
        os.kill(beat.pid, signal.SIGUSR1)
        deadline = time.monotonic() + _STACKS_S
        while not (text := path.read_text(errors="replace")) and time.monotonic() < deadline:
            time.sleep(0.1)
        return text
    except OSError:
        return ""


def _line(pattern: str, path: str) -> str:
    try:
        found = re.search(pattern, Path(path).read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return ""
    return found[1].strip() if found else ""
