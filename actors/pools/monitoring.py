"""What a run shows in Ray's dashboard, Prometheus and Grafana: gauges `ray_rayrlhf_*`, listed in docs/monitoring.md.

Two processes export: the first rank of a training loop what it writes to metrics.jsonl, and the coordinator every few
seconds where prompts, weights and actors are. A gauge vanishes with the process that set it.
"""

from __future__ import annotations

import math
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import SupportsFloat

import ray
from ray.util.metrics import Gauge

from rayrlhf.runs.metrics import MetricsWriter

EXPORT_S = 2.0
"""How often the coordinator says where things are; Ray collects its gauges every 10 s by default."""
CONTROL = "control"
"""The coordinator's concurrency group for what must not wait for a batch: `status`."""


@dataclass(frozen=True)
class Status:
    """What the coordinator knows at one moment."""

    version: int
    """Of the weights that were published last; 0 before the first."""
    versions: dict[str, int]
    """Of the weights that each generator has or has been asked to load, by actor; those without any are left out, or
    have -1."""
    groups: dict[str, int]
    """Prompts, with all their samples, by where they are; nothing is under way between the batches of a
    synchronous PPO and outside PPO."""
    actors: dict[str, int]
    """At work, by role."""
    wanted: dict[str, int]
    """Actors that there are to be, by role: the others start or leave."""
    replacements: dict[str, int]
    """Actors that died, by role."""


class Gauges:
    """The gauges of one run, each made when it is first set. A name has the same tags every time."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._gauges: dict[str, Gauge] = {}

    def set(self, name: str, value: float, **tags: str) -> None:
        """`ray_rayrlhf_NAME{run, ...}`; what Prometheus does not take in a name becomes an underscore."""
        if name not in self._gauges:
            safe = re.sub(r"\W", "_", name, flags=re.ASCII)
            self._gauges[name] = Gauge(f"rayrlhf_{safe}", f"{name}, see docs/monitoring.md", ("run", *tags))
        self._gauges[name].set(value, {"run": self._run, **tags})


class ExportingWriter(MetricsWriter):
    """A metrics writer whose numbers are gauges as well: `ppo/kl` is `ray_rayrlhf_ppo_kl{run, stage}`."""

    def __init__(self, run_dir: str | Path, run: str) -> None:
        super().__init__(run_dir)
        self._gauges = Gauges(run)
        self._idle: dict[str, set[str]] = {}
        """Actors of each stage whose idle share has been exported."""

    def write(self, stage: str, step: int, values: Mapping[str, SupportsFloat]) -> None:
        super().write(stage, step, values)
        idle = {name.removeprefix("idle/") for name in values if name.startswith("idle/")}
        for gone in self._idle.get(stage, set()) - idle:  # its series would keep its last value
            self._gauges.set("idle", math.nan, stage=stage, actor=gone)
        self._idle[stage] = self._idle.get(stage, set()) | idle
        for name, value in {"step": step, "step_time_seconds": time.time(), **values}.items():
            if name.startswith("idle/"):
                self._gauges.set("idle", float(value), stage=stage, actor=name.removeprefix("idle/"))
            else:
                self._gauges.set(name, float(value), stage=stage)


def metrics_writer(run_dir: str | Path, run: str) -> MetricsWriter:
    """The writer of a training loop of the run of that name; it exports gauges where there is Ray."""
    return ExportingWriter(run_dir, run) if ray.is_initialized() else MetricsWriter(run_dir)


def export_status(run: str, status: Callable[[], Status]) -> None:
    """Export `status()` from a thread of its own, for as long as this process lives."""
    gauges = Gauges(run)

    def export() -> None:
        versions: dict[str, float] = {}
        while True:
            now = status()
            # The series of an actor that is gone would keep its last value for as long as this process lives.
            versions = dict.fromkeys(versions, math.nan) | {"learner": now.version} | now.versions
            for actor, version in versions.items():
                gauges.set("weight_version", version, actor=actor)
            for place, count in now.groups.items():
                gauges.set("groups", count, state=place)
            for role, count in now.actors.items():
                gauges.set("actors", count, role=role)
            for role, count in now.wanted.items():
                gauges.set("actors_wanted", count, role=role)
            for role, count in now.replacements.items():
                gauges.set("replacements", count, role=role)
            time.sleep(EXPORT_S)

    threading.Thread(target=export, name="monitoring", daemon=True).start()
