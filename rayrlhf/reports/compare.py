"""`rayrlhf compare`: tables and curves of one run, or of several that differ in their seed.

The interval of a single run is over prompts: it says what to expect of the same models on other prompts.
Student's t interval over runs says what to expect of another seed on the same prompts. A mean over runs is given with
the wider of the two.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import pyarrow as pa

from rayrlhf.config_file import parse_config
from rayrlhf.errors import UserError
from rayrlhf.files import replacing
from rayrlhf.reports import shares
from rayrlhf.reports.curves import compare_figure
from rayrlhf.reports.intervals import over_runs, p_text, pooled
from rayrlhf.reports.measures import (
    AT_EQUAL_LENGTH,
    EVALUATED,
    MEASURES,
    PHASES,
    SOURCES,
    TOKENS_PER_S,
    WITHIN_ONE,
    interval_text,
)
from rayrlhf.reports.page.comparison import compared_page
from rayrlhf.reports.results import POLICY, read_evaluation
from rayrlhf.reports.warnings import warnings_of
from rayrlhf.resampling import Array, Interval
from rayrlhf.runs.addresses import join
from rayrlhf.runs.folder import RunFolder, run_at
from rayrlhf.runs.metrics import read_metrics
from rayrlhf.runs.reading import read_table, sound
from rayrlhf.runs.rounds import newest_round
from rayrlhf.runs.stages import STAGES
from rayrlhf.runs.storage import as_user_error
from rayrlhf.yaml_text import read_yaml_text

_SAME = {"name", "runs_dir", "seed", "resources", "alarms"}
"""Top-level keys of the config in which the runs of a comparison may differ; other differences are reported."""
_PAIRED = {f"{measure}_{source}" for measure in {*MEASURES, "length"} for source in ("policy", "sft")}
"""Columns of samples.parquet that are subtracted from each other."""


@dataclass(frozen=True)
class Run:
    """The files of a finished run, as far as a comparison reads them."""

    label: str
    config: Mapping[str, Any]
    evaluation: Mapping[str, Any]
    samples: pa.Table
    metrics: Sequence[Mapping[str, Any]]

    def stage(self, name: str) -> list[Mapping[str, Any]]:
        """Lines of one stage of metrics.jsonl."""
        return [line for line in self.metrics if line["stage"] == name]


def read_runs(folders: Sequence[str | Path]) -> list[Run]:
    """The finished runs at `folders`, paths or URIs, evaluated on the same prompts.

    Raises:
        UserError: a folder that is no finished run, is named twice, or was evaluated on other prompts than the first.
    """
    named = [run_at(folder) for folder in folders]
    found = []
    for folder in named:
        with _as_user_error(folder):
            found.append(newest_round(folder))
    addresses = [join(folder.address) for folder in found]
    for address in addresses:
        if addresses.count(address) > 1:
            raise UserError(f"{address} is named twice: a run counts once")
    names = [folder.name for folder in named]
    labels = names if len(set(names)) == len(names) else [str(folder) for folder in folders]
    runs = []
    for folder, whole, label in zip(found, named, labels, strict=True):
        with _as_user_error(folder):
            runs.append(_read(folder, label, whole))
    first = runs[0].samples["id"].to_pylist()
    for address, run in zip(addresses, runs, strict=True):
        ids = run.samples["id"].to_pylist()
        if ids != first:
            raise UserError(
                f"{address} was evaluated on other prompts than {addresses[0]} ({len(ids)} and {len(first)}, "
                f"{len(set(ids) & set(first))} of them the same); compare runs with the same data and evaluate settings"
            )
    return runs


def _as_user_error(folder: RunFolder) -> contextlib.AbstractContextManager[None]:
    return as_user_error(folder.address) if folder.store else contextlib.nullcontext()


def _read(folder: RunFolder, label: str, whole: RunFolder) -> Run:
    """`folder` is that of the newest round where `whole` has rounds; of these, the config is that of all."""
    written = whole.read(whole.config)
    if written is None:
        raise UserError(f"{folder.address} is no run folder: it has no {folder.config.name}")
    measured, answers = folder.read(folder.evaluation), folder.read(folder.samples)
    if measured is None or answers is None:
        missing = folder.evaluation if measured is None else folder.samples
        raise UserError(f"{folder.address} is unfinished: it has no {missing.name}; finish it with `rayrlhf run`")
    with sound(whole.address_of(whole.config)):
        config = dict(read_yaml_text(written.decode()))
    evaluation = read_evaluation(folder, *POLICY, "metadata")
    assert evaluation is not None, "it is there, see above"
    if "policy_minus_sft" not in evaluation["differences"]:
        raise UserError(f"{folder.address_of(folder.evaluation)} has no policy_minus_sft; evaluate the run again")
    samples = read_table(answers, folder.address_of(folder.samples), "id")
    with sound(folder.address_of(folder.samples)):
        for place, name in enumerate(samples.column_names):
            if name in _PAIRED:
                samples = samples.set_column(place, name, samples[name].cast(pa.float64()))
    metrics = read_metrics(folder.address)
    if not any(line["stage"] in ("dpo", "rl") for line in metrics):
        raise UserError(
            f"{folder.address} has no steps of dpo or rl in {folder.metrics.name}; it is not a whole run folder"
        )
    return Run(label, config, evaluation, samples, metrics)


def markdown(runs: Sequence[Run]) -> str:
    """All tables, each with a sentence on its numbers."""
    several = len(runs) > 1
    parts = ["# " + ", ".join(f"{run.label} (seed {run.config.get('seed')})" for run in runs)]
    facts = runs[0].evaluation["metadata"]
    parts.append(f"Evaluated on {facts.get('data', 'the test split')}: {facts['prompts']} prompts.")
    if changed := config_differences(runs):
        parts.append(f"**Not only the seed differs**: {', '.join(changed)}.")
    kind = "Means [95 % interval over prompts]."
    if several:
        kind = (
            f"Means over {len(runs)} runs [95 % interval, the wider of two: Student's t over runs, "
            "and the runs' own over prompts]."
        )
    parts += [f"## Evaluation\n\n{kind}", table(mean_rows(runs))]
    if several:
        for source in ("policy", "sft"):
            parts.append(f"{SOURCES[source].words}, each run [95 % interval over prompts]:")
            parts.append(table(run_rows(runs, source)))
    parts.append(
        "## Policy minus SFT\n\nPaired differences on the same prompts [95 % bootstrap interval over prompts], "
        "p of the sign-flip test." + ("\nPooled: runs and prompts are resampled." if several else "")
    )
    parts.append(table(difference_rows(runs)))
    parts += ["## Time\n\nMedians" + (" (smallest to largest run)." if several else "."), table(stage_rows(runs))]
    if any(run.stage("rl") for run in runs):
        parts.append(table(phase_rows(runs)))
    rows = warning_rows(runs)
    parts += ["## Warnings", table(rows) if len(rows) > 1 else "none"]
    return "\n\n".join(parts) + "\n"


def table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is its head."""
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|---" * len(rows[0]) + "|", *body])


def config_differences(runs: Sequence[Run]) -> list[str]:
    """`key (value, value, ...)` for each key of the configs in which the runs differ, seed and the like aside."""
    flat = [_flatten({k: v for k, v in run.config.items() if k not in _SAME}) for run in runs]
    keys = dict.fromkeys(key for config in flat for key in config)
    values = {key: [config.get(key, "not set") for config in flat] for key in keys}
    return [f"{key} ({', '.join(map(str, v))})" for key, v in values.items() if any(x != v[0] for x in v)]


def mean_rows(runs: Sequence[Run]) -> list[list[str]]:
    """Means over runs: one row for each measure, one column for each source of answers."""
    sources = [source for source in SOURCES if source in runs[0].evaluation]
    rows = [["measure", *(SOURCES[source].words for source in sources)]]
    for measure in EVALUATED:
        found = [mean_over_runs(runs, source, measure) for source in sources]
        if any(found):
            rows.append([measure, *map(_cell, found)])
    return rows


def run_rows(runs: Sequence[Run], source: str) -> list[list[str]]:
    """One source's means: one row for each measure, one column for each run."""
    rows = [["measure", *(run.label for run in runs)]]
    for measure in EVALUATED:
        found = [_interval(run.evaluation[source].get(measure)) for run in runs]
        if any(found):
            rows.append([measure, *map(_cell, found)])
    return rows


def difference_rows(runs: Sequence[Run]) -> list[list[str]]:
    """Policy minus SFT: one row for each measure, then those at equal length; one column for each run.

    Several runs have a last column for all of them, pooled.
    """
    rows = [["measure", *(run.label for run in runs), *(["pooled"] if len(runs) > 1 else [])]]
    kinds = (
        ("policy_minus_sft", "", MEASURES),
        ("policy_minus_sft_at_equal_length", ", at equal length", AT_EQUAL_LENGTH),
    )
    for kind, words, measures in kinds:
        for measure in measures:
            found = [run.evaluation["differences"].get(kind, {}).get(measure) for run in runs]
            cells = [_cell(_interval(f)) + (f", {p_text(f['p'])}" if f and "p" in f else "") for f in found]
            if len(runs) > 1:
                cells.append(_cell(pooled_difference(runs, measure, at_equal_length=bool(words))))
            if set(cells) != {"–"}:
                rows.append([measure + words, *cells])
    return rows


def stage_rows(runs: Sequence[Run]) -> list[list[str]]:
    """Seconds by stage, and tokens per second of the steps in each."""
    rows = [["stage", "seconds", "tokens/s of a step, median"]]
    for stage in STAGES:
        seconds = [n for run in runs for line in run.stage("run") if (n := line.get(f"time/{stage}")) is not None]
        rates = [_median(run.stage(stage), TOKENS_PER_S.name) for run in runs]
        rows.append([stage, _spread(seconds, ".0f"), _spread([rate for rate in rates if rate is not None], ",.0f")])
    return rows


def phase_rows(runs: Sequence[Run]) -> list[list[str]]:
    """Median seconds of each phase of a RL step."""
    rows = [["phase of a RL step", "seconds, median"]]
    for phase in (*PHASES, "step"):
        seconds = [_median(run.stage("rl"), f"time/{phase}") for run in runs]
        rows.append([phase, _spread([value for value in seconds if value is not None], ".2f")])
    return rows


def warning_rows(runs: Sequence[Run]) -> list[list[str]]:
    """One row for each warning of a run, with the number that passed a limit in the first and in the last step."""
    rows = [["run", "where", "warning", "limit", "at first", "at last"]]
    for run in runs:
        config = None
        with contextlib.suppress(UserError):  # of another version of this program
            config = parse_config(dict(run.config), run.label)
        for warned in warnings_of(run.metrics, config):
            limit = "–" if warned.limit is None else f"{warned.key} {warned.limit:g}"
            values = ["–" if value is None else f"{value:.3g}" for value in (warned.value, warned.latest)]
            rows.append([run.label, warned.where, warned.text, limit, *values])
    return rows


def mean_over_runs(runs: Sequence[Run], source: str, measure: str) -> Interval | None:
    """The mean over runs, with the wider of two intervals; None if a run lacks the measure.

    One is the t interval over runs, the other the mean of the runs' own intervals over prompts.
    """
    found = [_interval(run.evaluation.get(source, {}).get(measure)) for run in runs]
    known = [value for value in found if value is not None]
    if len(known) < len(runs):
        return None
    if len(known) == 1:
        return known[0]
    of_runs = shares.over_runs if measure in WITHIN_ONE else over_runs
    seeds, low, high = of_runs([v.mean for v in known]), mean(v.low for v in known), mean(v.high for v in known)
    return Interval(seeds.mean, min(low, seeds.low), max(high, seeds.high), seeds.n)


def pooled_difference(runs: Sequence[Run], measure: str, *, at_equal_length: bool = False) -> Interval | None:
    """Policy minus SFT over all runs and prompts; None where samples.parquet lacks a column, as in older runs."""
    values = _paired(runs, measure)
    lengths = _paired(runs, "length") if at_equal_length else None
    if values is None or (at_equal_length and lengths is None):
        return None
    return pooled(values, lengths)


def write(runs: Sequence[Run], output: Path) -> tuple[Path, Path, Path]:
    """Write `compare.md`, `curves.png` and `compare.html` into the folder `output`, and return their paths."""
    rouge = {
        source: {m: value for m in MEASURES if m.startswith("rouge") and (value := mean_over_runs(runs, source, m))}
        for source in SOURCES
    }
    text, image, page = (output / name for name in ("compare.md", "curves.png", "compare.html"))
    lines, tables = {run.label: run.stage("rl") for run in runs}, markdown(runs)
    with replacing(image) as temporary:
        compare_figure(list(lines.values()), rouge).savefig(temporary, format="png", dpi=150)
    with replacing(text) as temporary:
        temporary.write_text(f"{tables}\n![curves](curves.png)\n", encoding="utf-8")
    with replacing(page) as temporary:
        temporary.write_text(compared_page(tables, lines), encoding="utf-8")
    return text, image, page


def _paired(runs: Sequence[Run], measure: str) -> Array | None:
    """[runs, prompts] policy minus SFT."""
    names = [f"{measure}_{source}" for source in ("policy", "sft")]
    if any(name not in run.samples.column_names for run in runs for name in names):
        return None
    policy, sft = (np.array([run.samples[name].to_numpy() for run in runs], dtype=np.float64) for name in names)
    return np.asarray(policy - sft)


def _interval(value: Mapping[str, float] | None) -> Interval | None:
    return None if value is None else Interval(value["mean"], value["low"], value["high"], int(value["n"]))


def _cell(value: Interval | None) -> str:
    return interval_text(None if value is None else asdict(value))


def _median(lines: Sequence[Mapping[str, Any]], name: str) -> float | None:
    values = [line[name] for line in lines if line.get(name) is not None]
    return median(values) if values else None


def _spread(values: Sequence[float], form: str) -> str:
    """The median, with the range of several."""
    if not values:
        return "–"
    text = format(median(values), form)
    return text if len(values) == 1 else f"{text} ({min(values):{form}} to {max(values):{form}})"


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat
