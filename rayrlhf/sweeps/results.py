"""The results of a sweep: its trials side by side, best first, in the terminal, in sweep.md and in sweep.json."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from rayrlhf.files import replacing
from rayrlhf.reports.measures import interval_text
from rayrlhf.reports.progress import duration
from rayrlhf.reports.results import POLICY, read_evaluation
from rayrlhf.runs.folder import RunFolder
from rayrlhf.runs.metrics import read_metrics
from rayrlhf.runs.stages import STAGES
from rayrlhf.sweeps.plan import Sweep, Trial, short_names

COLUMNS = ("policy_minus_sft.gold", "policy.reward", "policy.kl", "policy.length")
"""Shown beside the metric that ranks the trials."""


@dataclass(frozen=True)
class Result:
    """One trial, finished or not."""

    trial: Trial
    evaluation: Mapping[str, Any] | None
    """evaluation.json, if the trial is finished."""
    seconds: float | None
    """Time of the stages that the trial ran itself. A stage that was interrupted counts with its last attempt."""
    error: str | None = None
    """Why the trial failed, in one line."""

    def interval(self, metric: str) -> Mapping[str, float] | None:
        """`{"mean", "low", "high", "n"}` of one of `rayrlhf.sweeps.plan.METRICS`; None if it was not measured."""
        if self.evaluation is None:
            return None
        source, measure = metric.split(".")
        return {**self.evaluation, **self.evaluation["differences"]}[source].get(measure)

    @property
    def state(self) -> str:
        if self.evaluation is not None:
            return "finished"
        return f"failed: {self.error}" if self.error else "not finished"


def read_result(trial: Trial, run: RunFolder, shared: Sequence[str], error: str | None = None) -> Result:
    """The result in a trial's run folder.

    Args:
        trial: the trial.
        run: its folder.
        shared: the stages that ran once for all trials; their time is not the trial's.
        error: why the trial failed, in one line.
    """
    if not run.done("evaluate"):
        return Result(trial, None, None, error)
    own = {f"time/{stage}" for stage in STAGES if stage not in shared}
    times: dict[str, float] = {}
    for line in read_metrics(run.address, "run"):
        times |= {name: line[name] for name in own & line.keys() if line[name] is not None}
    return Result(trial, read_evaluation(run, *POLICY, "metadata"), sum(times.values()))


def ranked(results: Sequence[Result], metric: str, mode: str) -> list[Result]:
    """The results, best first; those without the metric come last, in the order in which they are given."""

    def key(result: Result) -> float:
        interval = result.interval(metric)
        if interval is None:
            return float("inf")
        return interval["mean"] if mode == "min" else -interval["mean"]

    return sorted(results, key=key)


def rows(sweep: Sweep, results: Sequence[Result]) -> list[list[str]]:
    """The table's cells, headings first."""
    metric = sweep.settings.metric
    columns = [metric, *(name for name in COLUMNS if name != metric)]
    labels = short_names(sweep.search)
    table = [[*labels.values(), *(_heading(name) for name in columns), "time"]]
    for result in results:
        values = [_text(result.trial.values[key]) for key in labels]
        if result.evaluation is None:
            table.append([*values, result.state, *("–" for _ in columns)])
        else:
            measures = [interval_text(result.interval(name)) for name in columns]
            table.append([*values, *measures, duration(result.seconds or 0.0)])
    return table


def results_table(sweep: Sweep, results: Sequence[Result]) -> Table:
    """The ranked trials for the terminal."""
    headings, *body = rows(sweep, results)
    title = f"sweep {sweep.settings.name}, {caption(sweep, results)}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for heading in headings:
        table.add_column(heading.replace(", ", ",\n"), justify="right", overflow="fold")
    for row in body:
        table.add_row(*(cell.replace(" [", "\n[") for cell in row))  # intervals below: eight columns fit a log
    return table


def caption(sweep: Sweep, results: Sequence[Result]) -> str:
    """A sentence on the table's numbers: the order, the prompts, the intervals."""
    facts = next((r.evaluation["metadata"] for r in results if r.evaluation is not None), None)
    ranking = f"best {sweep.settings.metric} ({sweep.settings.mode}) first"
    if facts is None:
        return ranking
    return f"{ranking}; {facts.get('data', 'held out')}: {facts['prompts']} prompts, mean [95 % interval]"


def write_results(folder: RunFolder, sweep: Sweep, results: Sequence[Result]) -> tuple[str, str]:
    """Write sweep.md and sweep.json of the ranked `results` into the sweep's folder; returns their addresses."""
    best = results[0] if results and results[0].interval(sweep.settings.metric) else None
    command = sweep.command(best.trial) if best else None
    columns = dict.fromkeys([sweep.settings.metric, *COLUMNS])
    record = {
        **sweep.settings.model_dump(mode="json"),
        "split": sweep.base.evaluate.split,
        "seed": sweep.base.seed,
        "shared_stages": list(sweep.shared),
        "trials": [
            {
                "name": result.trial.name,
                "values": result.trial.values,
                "state": result.state,
                "measures": {name: result.interval(name) for name in columns},
                "seconds": result.seconds,
            }
            for result in results
        ],
        "best": best.trial.name if best else None,
        "command": command,
    }
    page, numbers = folder.path / "sweep.md", folder.path / "sweep.json"
    with replacing(numbers) as temporary:
        temporary.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    with replacing(page) as temporary:
        temporary.write_text(markdown(sweep, results, command), encoding="utf-8")
    folder.upload(numbers, page)
    return folder.address_of(page), folder.address_of(numbers)


def markdown(sweep: Sweep, results: Sequence[Result], command: str | None) -> str:
    """The ranked trials as a page with one table."""
    headings, *body = rows(sweep, results)
    numbers = ["---:" for _ in headings]
    table = "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in (headings, numbers, *body))
    shared = ", ".join(sweep.shared) or "nothing"
    text = (
        f"# Sweep {sweep.settings.name}\n\n{caption(sweep, results)}.\n"
        f"Shared by all trials: {shared}. Time is that of the stages that a trial ran itself.\n\n{table}\n"
    )
    return text + (f"\nThe best one, evaluated on the test split:\n\n```\n{command}\n```\n" if command else "")


def _heading(metric: str) -> str:
    source, measure = metric.split(".")
    return f"{measure}, policy − SFT" if source == "policy_minus_sft" else measure if source == "policy" else metric


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
