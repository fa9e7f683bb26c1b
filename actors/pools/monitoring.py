"""What a run shows in Ray's dashboard, Prometheus and Grafana: gauges `ray_rayrlhf_*`, listed in docs/monitoring.md.

Two processes export. The first rank of a training loop exports each line that it writes to metrics.jsonl. The
coordinator exports every few seconds where prompts, weights and actors are. A gauge vanishes with its process.
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

from rayrlhf.runs.metrics import MetricsWriter, Watcher, unwatched

EXPORT_S = 2.0
"""Between two exports of the coordinator, and of a gauge whose value stays, in seconds. Ray collects gauges every 10 s
by default."""
CONTROL = "control"
"""The coordinator's concurrency group for calls that must not wait for a batch, such as `status`."""


@dataclass(frozen=True)
class Status:
    """What the coordinator knows at one moment."""

    version: int
    """The weights that were published last; 0 before the first."""
    versions: dict[str, int]
    """The weights that each generator has or has been asked to load, by actor. A generator without any is left out, or
    has -1."""
    groups: dict[str, int]
    """How many groups (prompts with all their samples) are at each place; none unless generation runs ahead."""
    actors: dict[str, int]
    """How many actors are at work, by role."""
    wanted: dict[str, int]
    """How many actors there should be, by role: missing ones are starting, superfluous ones are about to leave."""
    replacements: dict[str, int]
    """How many actors have died, by role."""


class Gauges:
    """The gauges of one run, each made when it is first set. A name must have the same tags every time.

    Ray forgets a gauge that nobody has set for some seconds (17 in a trial), and a step may take longer: a thread sets
    each one again, for as long as this process lives. NaN ends a series.
    """

    def __init__(self, run: str) -> None:
        self._run = run
        self._gauges: dict[str, Gauge] = {}
        self._values: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        """By name and tags."""
        self._lock = threading.Lock()
        threading.Thread(target=self._repeat, name="gauges", daemon=True).start()

    def set(self, name: str, value: float, **tags: str) -> None:
        """Set `ray_rayrlhf_NAME{run, ...}`. Characters that Prometheus refuses in a name become underscores."""
        with self._lock:
            if name not in self._gauges:
                safe = re.sub(r"\W", "_", name, flags=re.ASCII)
                self._gauges[name] = Gauge(f"rayrlhf_{safe}", f"{name}, see docs/monitoring.md", ("run", *tags))
            self._values[name, tuple(tags.items())] = value
            self._gauges[name].set(value, {"run": self._run, **tags})

    def _repeat(self) -> None:
        while True:
            time.sleep(EXPORT_S)
            with self._lock:
                for (name, tags), value in self._values.items():
                    self._gauges[name].set(value, {"run": self._run, **dict(tags)})


class ExportingWriter(MetricsWriter):
    """A metrics writer that also sets a gauge for each number: `rl/kl` is `ray_rayrlhf_rl_kl{run, stage}`."""

    def __init__(self, run_dir: str | Path, run: str) -> None:
        super().__init__(run_dir)
        self._gauges = Gauges(run)
        self._idle: dict[str, set[str]] = {}
        """By stage, the actors whose idle share has been exported."""

    def write(self, stage: str, step: int, values: Mapping[str, SupportsFloat], watch: Watcher = unwatched) -> None:
        super().write(stage, step, values, watch)
        idle = {name.removeprefix("idle/") for name in values if name.startswith("idle/")}
        for gone in self._idle.get(stage, set()) - idle:  # otherwise its series would keep the last value
            self._gauges.set("idle", math.nan, stage=stage, actor=gone)
        self._idle[stage] = self._idle.get(stage, set()) | idle
        for name, value in {"step": step, "step_time_seconds": time.time(), **values}.items():
            if name.startswith("idle/"):
                self._gauges.set("idle", float(value), stage=stage, actor=name.removeprefix("idle/"))
            else:
                self._gauges.set(name, float(value), stage=stage)


def metrics_writer(run_dir: str | Path, run: str) -> MetricsWriter:
    """The writer of a training loop of this run; it also exports gauges if this process is part of a Ray cluster."""
    return ExportingWriter(run_dir, run) if ray.is_initialized() else MetricsWriter(run_dir)


def export_status(run: str, status: Callable[[], Status]) -> None:
    """Export `status()` every `EXPORT_S` seconds from a thread, for as long as this process lives."""
    gauges = Gauges(run)

    def export() -> None:
        versions: dict[str, float] = {}
        while True:
            now = status()
            # An actor that is gone gets NaN: otherwise its series would keep the last value.
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
