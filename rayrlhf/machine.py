"""What this machine has, and how a run's actors share it: `resources.auto`.

This module asks the operating system only, so that a config is read at once.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any


def usable_cores() -> int:
    """The CPU cores that this process may use: those that it may be scheduled on, within its container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.floor(min(cores, _quota(Path("/sys/fs/cgroup")))))


def usable_gpus() -> int:
    """The NVIDIA GPUs that this process may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip() and name.strip() != "-1"])
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def resources_for(cores: int, gpus: int) -> dict[str, dict[str, Any]]:
    """Counts, shares and threads of the three roles, as the section `resources` has them.

    Generating, scoring and learning take turns. So on CPUs every role may use all cores while it is at work, and on one
    or two GPUs roles share one. From three GPUs on, half learn, one scores, and the others generate.
    """
    if gpus >= 3:
        workers = gpus // 2
        counts, shares = (workers, gpus - workers - 1, 1), (1.0, 1.0, 1.0)
    else:
        counts = (1, 1, 1)
        shares = ((0.0, 0.0, 0.0), (0.4, 0.4, 0.2), (1.0, 0.6, 0.4))[gpus]
    # A sampler with many threads waits for them at each token; the others do much work at a time.
    threads = (1, 1, 1) if gpus else (cores, max(1, cores // 2), cores)
    cpus = [1.0] * 3 if sum(counts) <= cores else [_hundredths(cores * part) for part in _parts(counts)]
    learner, generators, scorers = (
        {"cpus": c, "gpus": g, "threads": t} for c, g, t in zip(cpus, shares, threads, strict=True)
    )
    return {
        "learner": {"workers": counts[0], **learner},
        "generators": {"count": counts[1], **generators},
        "scorers": {"count": counts[2], **scorers},
    }


def _parts(counts: tuple[int, int, int]) -> list[float]:
    """The part of all cores that each actor of a role asks for: the learner's twice that of the others."""
    weight = 2 * counts[0] + counts[1] + counts[2]
    return [2 / weight, 1 / weight, 1 / weight]


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
