"""What machines have, and how the actors of a run share them: `resources.auto`.

This module asks the operating system only, so that a config is read at once.
"""

from __future__ import annotations

import math
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

_CGROUP = Path("/sys/fs/cgroup")
_MIB = 2**20


_SMALL_GPU = 16.0 * 2**30
"""Bytes that a GPU counts as having which does not say."""
_OF_GPU = 0.9
"""Share of a GPU's memory for what is counted: the rest is for CUDA, and for gaps between tensors."""
_OF_MACHINE = {"learner": 1 / 2, "scorers": 1 / 4, "generators": 1 / 4}
"""Share of a machine's free memory that the actors of a role may take together, where they have no GPU."""


class Machine(NamedTuple):
    """A computer, or what a container may use of it."""

    cores: int
    gpus: int
    memory: float
    """Bytes that are free, without those of the GPUs."""
    gpu_memory: float = _SMALL_GPU
    """Bytes of the GPU that has least of them, whoever holds them now."""


def this_machine() -> Machine:
    """What this process may use."""
    gpus = usable_gpus()
    return Machine(usable_cores(), gpus, free_memory(), memory_of_gpus() if gpus else _SMALL_GPU)


def usable_cores() -> int:
    """The CPU cores that this process may use: those that it may be scheduled on, within its container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.floor(min(cores, _quota(_CGROUP))))


def usable_gpus() -> int:
    """The NVIDIA GPUs that this process may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip() and name.strip() != "-1"])
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def free_memory() -> float:
    """The bytes of memory that this process may still take: what the machine has free, within its container's limit."""
    return min(_available(Path("/proc/meminfo")), _left_of_limit(_CGROUP))


def memory_of_gpus() -> float:
    """The bytes of the GPU of this machine that has least of them; a small GPU's if none says."""
    try:
        said = subprocess.run(
            ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"],
            capture_output=True, text=True, timeout=30, check=True,
        ).stdout  # fmt: skip
        return min(float(line) for line in said.splitlines()) * _MIB
    except (OSError, ValueError, subprocess.SubprocessError):
        return _SMALL_GPU


def resources_for(machines: Sequence[Machine]) -> dict[str, dict[str, Any]]:
    """Counts, shares and threads of the three roles, as the section `resources` has them.

    Generating, scoring and learning take turns. So on CPUs every role may use all cores while it is at work, and on one
    or two GPUs roles share one. From three GPUs on, the others generate beside one that scores and those that learn:
    half of all, on one machine. Several machines with CPUs alone have an actor of each role each.

    Args:
        machines: at least one. Those without a GPU are left out if another one has some; of machines with CPUs alone,
            those with fewer cores than the largest.
    """
    gpus = sum(machine.gpus for machine in machines)
    cores = max(machine.cores for machine in machines)
    used = [m for m in machines if (m.gpus if gpus else m.cores == cores)]
    cores = min(machine.cores for machine in used)
    if gpus >= 3:
        workers = min(gpus // 2, max(machine.gpus for machine in used))
        counts, shares = (workers, gpus - workers - 1, 1), (1.0, 1.0, 1.0)
        crowd = max(m.gpus / m.cores for m in used)  # actors a core, on the machine with the fewest cores for its GPUs
        cpus = [min(1.0, _hundredths(1 / crowd))] * 3
    else:
        counts = (1, 1, 1) if gpus else (len(used),) * 3
        shares = ((0.0, 0.0, 0.0), (0.4, 0.4, 0.2), (1.0, 0.6, 0.4))[gpus]
        if len(used) > 1 and not gpus:
            # Ray puts learners together, and so one with more than half of a machine stays alone there.
            cpus = [_hundredths(cores * part) for part in (0.6, 0.2, 0.2)]
        else:
            # The learner asks for twice as much as the others.
            cpus = [1.0] * 3 if cores >= 3 else [_hundredths(cores * part) for part in (0.5, 0.25, 0.25)]
    # A sampler with many threads waits for them at each token; the others do much work at a time.
    threads = (1, 1, 1) if gpus else (cores, max(1, cores // 2), cores)
    learner, generators, scorers = (
        {"cpus": c, "gpus": g, "threads": t} for c, g, t in zip(cpus, shares, threads, strict=True)
    )
    return {
        "learner": {"workers": counts[0], **learner},
        "generators": {"count": counts[1], **generators},
        "scorers": {"count": counts[2], **scorers},
    }


def cache_for(machines: Sequence[Machine], generators: int, wanted_mib: int) -> int:
    """The MiB of a KV cache in the memory of a machine: what is wanted, or a part of a quarter of what is free.

    Args:
        machines: at least one; that with the least memory decides.
        generators: their number on all machines.
        wanted_mib: what one generator could use.
    """
    return max(1, math.floor(min(wanted_mib, room_of("generators", machines, generators, 0.0) / _MIB)))


def room_of(role: str, machines: Sequence[Machine], actors: int, gpus: float) -> float:
    """The bytes of memory for one actor of a role: of its GPU, or of a machine that it shares with the other roles.

    Args:
        role: as `resources` names it.
        machines: at least one; that with the least memory decides.
        actors: of the role, on all machines.
        gpus: of each of these actors.
    """
    if gpus:
        return _OF_GPU * min(gpus, 1.0) * min((m.gpu_memory for m in machines if m.gpus), default=_SMALL_GPU)
    return _OF_MACHINE[role] * min(m.memory for m in machines) / math.ceil(actors / len(machines))


def _hundredths(amount: float) -> float:
    return math.floor(100 * amount + 1e-9) / 100


def _quota(cgroup: Path) -> float:
    """The cores' worth of time that a container may use (the kernel's cgroup v2 or v1); infinite without a limit."""
    for limit, period in (("cpu.max", None), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            words = (cgroup / limit).read_text().split()
            words += (cgroup / period).read_text().split() if period else []
            if words[0] not in ("max", "-1"):
                return int(words[0]) / int(words[1])
        except (OSError, ValueError, IndexError):
            continue
    return math.inf


def _available(meminfo: Path) -> float:
    """The bytes that the kernel could give to a process without swapping; infinite where it does not say."""
    try:
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        return 1024.0 * int(lines["MemAvailable"].split()[0])
    except (OSError, ValueError, KeyError, IndexError):
        return math.inf


def _left_of_limit(cgroup: Path) -> float:
    """The bytes that are left of a container's limit (cgroup v2 or v1); infinite without a limit.

    Files that were read and may be forgotten count as usage, and are left: the kernel gives them back when asked.
    """
    for limit, usage, counts, cache in (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
    ):
        try:
            left = int((cgroup / limit).read_text()) - int((cgroup / usage).read_text())
        except (OSError, ValueError):  # no such file, or "max"
            continue
        try:
            stored = dict(line.split() for line in (cgroup / counts).read_text().splitlines())
            left += int(stored.get(cache, 0))
        except (OSError, ValueError):
            pass
        return max(0.0, float(left))
    return math.inf
