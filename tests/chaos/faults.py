"""What can happen to a run: a process of it dies or stops, a node goes, its disk is full, the power is cut."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rayrlhf.files import fingerprint
from tests.chaos.nodes import Nodes

ROLES = {
    "driver": r"/rayrlhf run ",
    "generator": r"^ray::Generator",
    "scorer": r"^ray::Scorer",
    "coordinator": r"^ray::Coordinator",
    "learner": r"^ray::RayTrainWorker",
    "controller": r"^ray::TrainController",
    "raylet": r"/raylet/raylet ",
    "gcs": r"/gcs/gcs_server ",
}
"""By role, what the command lines of its processes look like."""
TRAINING, SAMPLING = ("learner", "controller"), ("generator", "coordinator")
ALWAYS = ("driver", "raylet", "gcs")
IN_STAGE = {
    "sft": (*ALWAYS, *TRAINING),
    "collect": (*ALWAYS, *SAMPLING),
    "reward_model": (*ALWAYS, *TRAINING),
    "rl": (*ALWAYS, *TRAINING, *SAMPLING, "scorer"),
    "evaluate": (*ALWAYS, *SAMPLING, "scorer"),
}
"""The roles that are at work in each stage."""


@dataclass(frozen=True)
class Fault:
    """One thing that happens in a stage."""

    stage: str
    kind: str
    """kill, stop, lost node, full disk or power cut."""
    role: str = ""
    """Whose process is killed or stopped."""
    moment: float = 0.0
    """When, as a share of the stage's undisturbed time; in [0, 1)."""
    seconds: float = 0.0
    """How long a process is stopped, or the disk is full."""

    def __str__(self) -> str:
        lasting = f" for {self.seconds:.0f} s" if self.seconds else ""
        return f"{self.kind} {self.role}".strip() + f"{lasting} in {self.stage} at {self.moment:.0%}"


def draw(chance: random.Random, disk: bool, nodes: bool) -> list[Fault]:
    """A fault in each stage of a run, all decided by `chance`.

    Args:
        disk: whether the disk can be filled.
        nodes: whether there are several nodes, of which one can be lost.
    """
    faults = []
    for stage, roles in IN_STAGE.items():
        kinds = ["kill"] * 6 + ["stop"] * 2 + ["power cut"] + ["full disk"] * disk + ["lost node"] * 6 * nodes
        kind = chance.choice(kinds)
        # Neither Ray's own processes nor the driver are looked after by anybody: stopped, they are merely late.
        role = chance.choice(roles) if kind in ("kill", "stop") else ""
        lasting = chance.uniform(2, 15) if kind in ("stop", "full disk") else 0.0
        faults.append(Fault(stage, kind, role, chance.random(), lasting))
    return faults


def strike(
    fault: Fault, processes: Callable[[], dict[int, str]], run: Path, chance: random.Random, nodes: Nodes | None = None
) -> str | None:
    """Have it happen now; returns what was struck, or None if the run has no such process at this moment.

    Args:
        processes: returns the command lines of the run's living processes by pid.
        nodes: the cluster that the run is on, if that is not its own.
    """
    if fault.kind == "power cut":
        return _power_cut(processes, run, chance)
    if fault.kind == "full disk":
        return _fill(run, fault.seconds)
    if fault.kind == "lost node":
        assert nodes
        return nodes.lose(chance)
    found = [pid for pid, line in processes().items() if re.search(ROLES[fault.role], line)]
    if not found:
        return None
    pid = chance.choice(sorted(found))
    if fault.kind == "kill":
        os.kill(pid, signal.SIGKILL)
    else:
        _stop(pid, fault.seconds)
    return f"{fault.role}, process {pid}"


def _stop(pid: int, seconds: float) -> None:
    with contextlib.suppress(ProcessLookupError):  # replaced meanwhile, which is as good an answer
        os.kill(pid, signal.SIGSTOP)
        time.sleep(seconds)
        os.kill(pid, signal.SIGCONT)


def _fill(run: Path, seconds: float) -> str:
    """Take all that is left on the disk of the run for a while."""
    filler = run.parent / "filler"
    try:
        with filler.open("wb", buffering=0) as file:
            while True:
                try:
                    file.write(bytes(2**20))
                except OSError:
                    break
        time.sleep(seconds)
    finally:
        filler.unlink()
    return "the run's disk"


def _power_cut(processes: Callable[[], dict[int, str]], run: Path, chance: random.Random) -> str:
    """Kill every process at once, and damage what was written last, as a disk does that had not written it yet."""
    while left := processes():
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    metrics = run / "metrics.jsonl"
    if metrics.exists() and metrics.stat().st_size > 40:
        os.truncate(metrics, metrics.stat().st_size - chance.randrange(1, 40))
    states = sorted(run.glob("checkpoints/*/checkpoint_*/state.pt"), key=lambda path: path.stat().st_mtime)
    if len(states) < 2 or states[-1].parent.parent != states[-2].parent.parent:
        return "all processes, and the last line of metrics.jsonl"
    # One of two: the one before it has to serve.
    before = fingerprint(states[-1])
    with states[-1].open("r+b") as file:
        file.seek(chance.randrange(before["bytes"]))
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1 << chance.randrange(8)]))
    return f"all processes, the last line of metrics.jsonl, and one bit of {states[-1].relative_to(run)}"
