"""report.html of a run, finished or not: verdict, curves, samples, reward model, timings and config."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rayrlhf.errors import UserError
from rayrlhf.files import replacing
from rayrlhf.reports.agreement import Grid, labellers_grid, raters_grid
from rayrlhf.reports.page import facts, samples
from rayrlhf.reports.page.charts import Chart, Charts, over_kl_chart, stage_charts, time_charts
from rayrlhf.reports.page.frame import document
from rayrlhf.reports.page.reward_model import reward_model_charts
from rayrlhf.reports.page.tables import accuracy_table, evaluation_table
from rayrlhf.reports.raters import LONGER, compare, longer, people_of, raters_of
from rayrlhf.reports.results import read_accuracy, read_evaluation
from rayrlhf.reports.verdict import judge
from rayrlhf.reports.warnings import warnings_of
from rayrlhf.runs.folder import RunFolder, stored_config, stored_contents
from rayrlhf.runs.metrics import read_metrics
from rayrlhf.runs.reading import read_json_lines, read_rows, sound
from rayrlhf.runs.stages import STAGES
from rayrlhf.runs.versions import versions

Lines = Sequence[Mapping[str, Any]]
T = TypeVar("T")
log = logging.getLogger(__name__)
PAIRS = ("prompt", "reward_model", "longer")
"""Columns of heldout_pairs.parquet that the charts need."""


@dataclass(frozen=True)
class Curves:
    """The charts of one stage, by their places in the page's data."""

    id: str
    title: str
    steps: int
    charts: list[int]


def write_report(run: RunFolder) -> Path:
    """Write `report.html` of a run, finished or not, and return its path."""
    html = report(run, read_metrics(run.path))
    with replacing(run.report) as temporary:
        temporary.write_text(html, encoding="utf-8")
    return run.report


def report(run: RunFolder, metrics: Lines, live: str = "") -> str:
    """The page.

    Args:
        run: the run, whose other files are read at its address.
        metrics: its lines of metrics.jsonl.
        live: as for `document`.
    """
    config = stored_config(run) if run.read(run.config) is not None else None
    files = _Files()
    evaluation, accuracy = files.take(lambda: read_evaluation(run), None), files.take(lambda: read_accuracy(run), None)
    lines = {stage: [line for line in metrics if line["stage"] == stage] for stage in (*STAGES, "rl_eval")}
    charts = Charts()
    none: tuple[list[Chart], list[str]] = [], []
    pair_charts, said = files.take(lambda: _made(run, run.heldout_pairs, reward_model_charts, *PAIRS), none)
    if not accuracy:
        pair_charts, said = none
    best = [int(n) for line in lines["rl_eval"] if (n := line.get("rl_eval/best_step")) is not None]
    collections = [
        each
        for each in (
            files.take(lambda: _made(run, run.samples, samples.evaluated, "id", "post"), None),
            files.take(lambda: samples.while_rl_ran(run, best[-1] if best else None), None),
        )
        if each is not None
    ]
    tokens = run.address_of(run.tokens)
    looks: list[dict[str, Any]] = files.take(lambda: read_json_lines(run.read(run.tokens) or b"", tokens), [])
    over_kl = over_kl_chart(lines["rl"])
    tables: list[Grid] = files.take(lambda: _agreement(run), []) if config else []
    hashes: list[tuple[str, str, str]] = files.take(lambda: facts.hashes(stored_contents(run)), [])
    context: dict[str, Any] = {
        "title": run.name,
        "done": [stage.title for stage in STAGES.values() if run.done(stage.name)],
        "algorithm": config.rl.algorithm if config and config.has("rl") else None,
        "config": config,
        "when": facts.when(metrics),
        "verdict": judge(
            evaluation, lines["rl"], lines["rl_eval"], accuracy, config.rl.samples_per_prompt if config else 1
        ),
        "warnings": warnings_of(metrics, config) if metrics else [],
        "evaluation": evaluation_table(evaluation) if evaluation else None,
        "over_kl": charts.add([over_kl] if over_kl else []),
        "curves": _curves(charts, lines),
        "collections": collections,
        "looks": looks,
        "accuracy": accuracy_table(accuracy) if accuracy else None,
        "pair_charts": charts.add(pair_charts),
        "pair_words": said,
        "agreement": tables,
        "faults": list(dict.fromkeys(files.faults)),
        "bars": facts.bars(metrics),
        "time_charts": charts.add(time_charts(lines["rl"])),
        "settings": facts.own_settings(config) if config else [],
        "yaml": (run.read(run.config) or b"").decode("utf-8", "replace"),
        "versions": versions(),
        "hashes": hashes,
    }
    data = {
        "charts": [chart.data() for chart in charts.all],
        "samples": [collection.data() for collection in collections],
        "tokens": looks,
        "seed": config.seed if config else 0,
    }
    return document("report.html", data, live, **context)


def _curves(charts: Charts, lines: Mapping[str, Lines]) -> list[Curves]:
    """The curves of each stage that trains, the last one first; those on dev prompts are beside those of `rl`."""
    found = []
    for stage in reversed([stage for stage in STAGES.values() if stage.trains]):
        places = charts.add(stage_charts(stage.name, lines[stage.name]))
        if places:
            found.append(Curves(stage.name, stage.title, len(lines[stage.name]), places))
        if stage.name == "rl" and (places := charts.add(stage_charts("rl_eval", lines["rl_eval"]))):
            found.append(Curves("rl_eval", "Dev prompts while RL ran", len(lines["rl_eval"]), places))
    return found


class _Files:
    """A damaged file is named, and is no reason for a run to end without its report."""

    def __init__(self) -> None:
        self.faults: list[str] = []

    def take(self, read: Callable[[], T], missing: T) -> T:
        """What `read` gives; `missing` where a file is damaged, which is noted."""
        try:
            return read()
        except UserError as error:
            log.warning("%s", error)
            self.faults.append(str(error))
            return missing


def _agreement(run: RunFolder) -> list[Grid]:
    """The raters of the run beside each other, and its labellers; nothing where no two raters saw the same pair."""
    raters = raters_of(run)
    compared = compare(raters | {LONGER: longer(raters.values())})
    people = people_of(run)
    return ([raters_grid(compared)] if compared else []) + ([labellers_grid(*people)] if people else [])


def _made(run: RunFolder, path: Path, make: Callable[[list[dict[str, Any]]], T], *columns: str) -> T:
    """What `make` makes of the rows of a Parquet file, which has at least these columns; of no row without a file."""
    content, address = run.read(path), run.address_of(path)
    with sound(address):
        return make([] if content is None else read_rows(content, address, *columns))
