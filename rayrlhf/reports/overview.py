"""The state of a run as its folder tells it: the stages that are done, the progress of the current one, warnings."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayrlhf.config import Config
from rayrlhf.config_file import load_config
from rayrlhf.errors import UserError
from rayrlhf.reports.progress import has_step_line
from rayrlhf.reports.warnings import warnings_of
from rayrlhf.runs.folder import RunFolder, run_at, stored_config
from rayrlhf.runs.metrics import read_metrics
from rayrlhf.runs.rounds import newest_round
from rayrlhf.runs.stages import STAGES, stages_of
from rayrlhf.runs.stores import store_errors

_RECENT = 10
"""The pace is measured over so many of the last steps."""


@dataclass(frozen=True)
class StageOverview:
    name: str
    done: bool
    step: int
    """Finished steps."""
    steps: int | None
    """All steps of the stage; None where the metrics do not say, and for stages without steps."""
    last: Mapping[str, Any] | None
    """The newest line with measures of training, as `rayrlhf.runs.metrics.read_metrics` gives it."""
    seconds_a_step: float | None
    """Median over the last steps, including the checkpoints and evaluations between them."""
    took_s: float | None
    """Seconds that a finished stage took."""

    @property
    def eta_s(self) -> float | None:
        """Seconds to go at that pace."""
        if self.done or self.steps is None or self.seconds_a_step is None:
            return None
        return (self.steps - self.step) * self.seconds_a_step


@dataclass(frozen=True)
class Overview:
    run: RunFolder
    """Of a run in rounds, the folder of its newest round."""
    name: str
    """Of the run, with that round behind it."""
    config: Config
    holder: str | None
    """The process that works on the run, in words; None if none does."""
    stages: tuple[StageOverview, ...]
    """The stages that the run has: without `collect` where comparisons are given."""
    warnings: tuple[str, ...]
    """The last warnings of the run, a line each."""
    updated: float | None
    """Unix time of the last line of metrics.jsonl."""

    @property
    def current(self) -> StageOverview | None:
        """The first stage that is not done."""
        return next((stage for stage in self.stages if not stage.done), None)

    def stage(self, name: str) -> StageOverview:
        return next(stage for stage in self.stages if stage.name == name)

    @property
    def newest(self) -> StageOverview | None:
        """The last stage that has measures of training."""
        return next((stage for stage in reversed(self.stages) if stage.last), None)


def read_overview(address: str | Path, max_warnings: int = 5) -> Overview:
    """Read the run folder at `address`, a path or the URI of a folder in a store; nothing is written or copied.

    Raises:
        UserError: it is none, its config cannot be read, or the store does not answer.
    """
    whole = run_at(address)
    with store_errors(whole.store):
        run = newest_round(whole)
        return _read(run, whole.name if run is whole else f"{whole.name}/{run.name}", max_warnings)


def _read(run: RunFolder, name: str, max_warnings: int) -> Overview:
    config, lines = _config(run), read_metrics(run.address)
    of = {name: [line for line in lines if line["stage"] == name] for name in STAGES}
    took = {key: line[key] for line in lines if line["stage"] == "run" for key in line if key.startswith("time/")}
    own = [stage.name for stage in stages_of(config)]
    stages = tuple(_stage(name, run.done(name), of[name], config, took.get(f"time/{name}")) for name in own)
    return Overview(
        run,
        name,
        config,
        run.holder(),
        stages,
        tuple(warned.line for warned in warnings_of(lines, config))[-max_warnings:],
        max((line["time"] for line in lines), default=None),
    )


def _config(run: RunFolder) -> Config:
    if not run.store and run.config.exists():
        return load_config(run.config)
    if run.read(run.config) is None:
        raise UserError(f"{run.address}: no run folder (it has no config.yaml); `rayrlhf runs DIR` lists those in DIR")
    return stored_config(run)


def _stage(
    name: str, done: bool, lines: Sequence[Mapping[str, Any]], config: Config, took_s: float | None
) -> StageOverview:
    logged = next((n for line in lines if (n := line.get(f"{name}/steps")) is not None), None)
    steps = config.rl.steps if name == "rl" else logged if logged is None else int(logged)
    step = int(lines[-1]["step"]) if lines else 0
    times = [line["time"] for line in lines[-_RECENT - 1 :]]
    gaps = [after - before for before, after in itertools.pairwise(times)]
    last = next((line for line in reversed(lines) if has_step_line(name, line)), None)
    return StageOverview(name, done, step, steps, last, statistics.median(gaps) if gaps else None, took_s)
