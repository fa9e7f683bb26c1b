"""report.html: one page with a run's evaluation, curves, samples and config. It needs no other file."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq

from rayrlhf.config_file import load_config
from rayrlhf.files import replacing
from rayrlhf.reports.agreement import labellers_grid, raters_grid
from rayrlhf.reports.curves import over_kl_figure, style
from rayrlhf.reports.intervals import p_text
from rayrlhf.reports.measures import DIFFERENCES, EVALUATED, PANELS, SCORERS, SOURCES, Panel, decimals, panels_of
from rayrlhf.reports.progress import headline
from rayrlhf.reports.raters import LONGER, compare, longer, people_of, raters_of
from rayrlhf.reports.warnings import Warned, warnings_of
from rayrlhf.runs.folder import RunFolder
from rayrlhf.runs.metrics import read_metrics
from rayrlhf.runs.stages import STAGES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_SAMPLES = 12
MAX_LOOKS = 5
"""Steps whose answers to a dev prompt stand side by side."""

_COLOURS = ["#3b6fb6", "#d1772e", "#4a9a62", "#8d5fa8"]
_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2430; background: #fff; }
body { max-width: 1100px; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #d9dde5; }
.sub, caption, .ci { color: #677083; } .ci { font-size: 85%; white-space: nowrap; }
img { max-width: 100%; display: block; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: .5rem; }
th, td { padding: .35rem .9rem .35rem 0; text-align: right; vertical-align: top; border-bottom: 1px solid #eceef3; }
th:first-child { text-align: left; font-weight: normal; } thead th { font-weight: 600; }
details, pre { background: #f6f7fa; border-radius: 6px; padding: .6rem .9rem; } details { margin: .6rem 0; }
pre, .post { white-space: pre-wrap; overflow-wrap: anywhere; } pre { font-size: 13px; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: .8rem; }
.answers { margin: .6rem 0 1.6rem; }
.answers > div { border-left: 3px solid #c9d2e3; padding-left: .7rem; white-space: pre-wrap; overflow-wrap: anywhere; }
.answers b { display: block; } summary { cursor: pointer; }
"""


def write_report(run: RunFolder) -> Path:
    """Write `report.html` of a run, finished or not, and return its path."""
    metrics = read_metrics(run.path)
    done = [stage for stage in STAGES if run.done(stage)]
    parts = [f"<h1>{escape(run.name)}</h1>", f'<p class="sub">done: {", ".join(done) or "nothing yet"}</p>']
    if run.evaluation.exists():
        parts.append(_evaluation(json.loads(run.evaluation.read_text(encoding="utf-8"))))
    if metrics and run.config.exists():
        parts.append(_warnings(warnings_of(metrics, load_config(run.config))))
    for stage in reversed([stage.name for stage in STAGES.values() if stage.trains]):
        lines = [line for line in metrics if line["stage"] == stage]
        figure = stage_figure(stage, lines)
        if figure is not None:
            title = STAGES[stage].title
            words = f"{title}: curves over {len(lines)} steps"
            parts.append(f'<h2>{title}</h2><img alt="{words}" src="{_inline(figure)}">')
        over_kl = over_kl_figure(lines) if stage == "rl" else None
        if over_kl is not None:
            parts.append(f'<img alt="gains of proxy and gold against KL" src="{_inline(over_kl)}">')
        evaluations = stage_figure(f"{stage}_eval", [line for line in metrics if line["stage"] == f"{stage}_eval"])
        if evaluations is not None:
            parts.append(f'<img alt="measures on dev prompts" src="{_inline(evaluations)}">')
        if stage == "reward_model" and run.reward_accuracy.exists():
            parts.append(_reward_accuracy(json.loads(run.reward_accuracy.read_text(encoding="utf-8"))))
    if run.config.exists():
        parts += _agreement(run)
    if shown := _dev_samples(run, metrics):
        parts.append(shown)
    if run.samples.exists():
        parts.append(_samples(pq.read_table(run.samples)))
    if run.config.exists():
        text = escape(run.config.read_text(encoding="utf-8"))
        parts.append(f"<h2>Config</h2><details><summary>config.yaml</summary><pre>{text}</pre></details>")
    head = f'<meta charset="utf-8"><title>{escape(run.name)}</title><style>{_STYLE}</style>'
    page = f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n' + "\n".join(parts) + "\n</body></html>\n"
    with replacing(run.report) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return run.report


def stage_figure(stage: str, lines: Sequence[Mapping[str, Any]]) -> Figure | None:
    """The curves of one stage's lines of metrics.jsonl; None if none of its metrics was written."""
    # Not pyplot: it keeps figures alive and picks a back end for the whole process.
    from matplotlib.figure import Figure

    names = {name for line in lines for name, value in line.items() if value is not None}
    known = panels_of(stage, names) if stage in PANELS else ()
    panels = [panel for panel in known if names & {measure.name for measure in panel.measures}]
    if not panels:
        return None
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.2 * columns, 2.7 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, panel in zip(grid.flat, panels, strict=False):
        _draw(axes, panel, lines)
    for axes in list(grid.flat)[len(panels) :]:
        axes.remove()
    return figure


def _draw(axes: Axes, panel: Panel, lines: Sequence[Mapping[str, Any]]) -> None:
    from matplotlib.ticker import MaxNLocator

    series = {}
    for measure in panel.measures:
        points = [(line["step"], line[measure.name]) for line in lines if line.get(measure.name) is not None]
        if points:
            series[measure.legend or measure.words] = points
    if panel.stacked:
        steps = sorted({step for points in series.values() for step, _ in points})
        heights = [[dict(points).get(step, 0.0) for step in steps] for points in series.values()]
        axes.stackplot(steps, heights, labels=list(series), colors=_COLOURS, alpha=0.85)
        axes.set_ylim(0, 1.3 * max(map(sum, zip(*heights, strict=True))) or None)  # room for the legend
    else:
        for colour, (label, points) in zip(_COLOURS, series.items(), strict=False):
            marker = "o" if len(points) <= 25 else None
            axes.plot(*zip(*points, strict=True), label=label, color=colour, linewidth=1.6, marker=marker, markersize=3)
    style(axes, panel.title, panel.unit, "step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    if len(series) > 1:
        if panel.stacked:
            axes.legend(fontsize=8, frameon=False, loc="upper left", ncols=len(series), handlelength=1, columnspacing=1)
        else:
            axes.legend(fontsize=8, frameon=False)


def _inline(figure: Figure) -> str:
    """The figure as a data URI. Inlined as SVG elements, two figures could have the same ids."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg")
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def _evaluation(result: Mapping[str, Any]) -> str:
    sources = [name for name in reversed(SOURCES) if name in result]
    differences = result.get("differences", {})
    changes = {head: differences[name] for name, head in DIFFERENCES.items() if name in differences}
    heads = [*(SOURCES[name].in_full for name in sources), *changes]
    rows = []
    for name, words in EVALUATED.items():
        cells = [row.get(name) for row in (*(result[source] for source in sources), *changes.values())]
        means = [cell["mean"] for cell in cells if cell is not None]
        if means:
            digits = decimals(means)
            rows.append(f"<tr><th>{words}</th>{''.join(_cell(cell, digits) for cell in cells)}</tr>")
    facts = result.get("metadata", {})
    caption = (
        f"{facts.get('data', 'test split')}, {facts.get('prompts', '?')} prompts; "
        f"labeller: {facts.get('labeller', '?')}. "
        "Means with 95 % intervals over prompts (bootstrap; Wilson's for shares); "
        "win rates by the reward model unless it says gold, ties "
        "count half; p of the paired sign-flip test; at equal length: by regression on the difference in length."
    )
    head = "".join(f"<th>{escape(words)}</th>" for words in ("", *heads))
    return (
        f"<h2>Evaluation</h2><table><caption>{escape(caption)}</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    )


def _reward_accuracy(result: Mapping[str, Any]) -> str:
    cells = {name: (result["accuracy"][name], result["reward_model_minus"].get(name)) for name in result["accuracy"]}
    rows = [f"<tr><th>{SCORERS[name]}</th>{''.join(_cell(c, 3) for c in both)}</tr>" for name, both in cells.items()]
    caption = (
        f"{result['pairs']} held-out pairs of {result['prompts']} prompts: share ordered rightly, ties count half, "
        "with 95 % bootstrap intervals over prompts."
    )
    return (
        f"<table><caption>{caption}</caption><thead><tr><th>ordered by</th><th>accuracy</th>"
        f"<th>reward model − it, paired</th></tr></thead><tbody>{''.join(rows)}</tbody></table>"
    )


def _agreement(run: RunFolder) -> list[str]:
    """The raters of the run beside each other, and its labellers; nothing where no two raters saw the same pair."""
    raters = raters_of(run)
    compared = compare(raters | {LONGER: longer(raters.values())})
    people = people_of(run)
    tables = ([raters_grid(compared)] if compared else []) + ([labellers_grid(*people)] if people else [])
    return ["<h2>Agreement</h2>", *(table.html() for table in tables)] if tables else []


def _cell(value: Mapping[str, float] | None, digits: int) -> str:
    if value is None:
        return "<td>–</td>"
    mean, low, high = (f"{value[key]:z.{digits}f}".replace("-", "−") for key in ("mean", "low", "high"))
    p = f"<br>{escape(p_text(value['p']))}" if "p" in value else ""
    return f'<td title="n = {value["n"]}">{mean}<br><span class="ci">{low} to {high}{p}</span></td>'


def _warnings(found: Sequence[Warned]) -> str:
    if not found:
        return "<h2>Warnings</h2><p class='sub'>none: no stage warned, and no step passed a limit of alarms</p>"
    shown = "".join(f"<li>{escape(warned.line)}</li>" for warned in found)
    return f"<h2>Warnings</h2><ul>{shown}</ul>"


def _dev_samples(run: RunFolder, metrics: Sequence[Mapping[str, Any]]) -> str:
    """The answers to dev prompts while `rl` ran, side by side: the first, some between, the last; empty without any."""
    if run.store and run.store.exists(run.dev_samples):
        run.download(run.dev_samples)
    files = sorted(run.dev_samples.glob("step_*.jsonl"))
    if not files:
        return ""
    places = {round(i * (len(files) - 1) / (MAX_LOOKS - 1)) for i in range(MAX_LOOKS)}
    looks = [[json.loads(line) for line in files[i].read_text(encoding="utf-8").splitlines()] for i in sorted(places)]
    best = [int(line["rl_eval/best_step"]) for line in metrics if "rl_eval/best_step" in line]
    published = best[-1] if best else looks[-1][0]["step"]
    parts = [
        "<h2>Answers while rl ran</h2><p class='sub'>the same dev prompts, near-greedily; step 0 is the model that rl "
        f"started from; {len(looks)} of {len(files)} steps (all in {run.dev_samples.name}/)</p>"
    ]
    for rows in zip(*looks, strict=True):
        answers = "".join(_look(row, row["step"] == published and run.done("rl")) for row in rows)
        post = escape(rows[0]["prompt"].strip())
        parts.append(
            f'<details><summary>{escape(headline(rows[0]["prompt"]))}</summary><div class="post">{post}</div></details>'
            f'<div class="answers">{answers}</div>'
        )
    return "\n".join(parts)


def _look(row: Mapping[str, Any], published: bool) -> str:
    numbers = ", ".join(f"{kind} {row[kind]:.3f}" for kind in ("score", "gold") if row[kind] is not None)
    name = f"step {row['step']}" + (", the policy" if published else "")
    text = escape(row["answer"].strip()) or "<i>(empty)</i>"
    return f'<div><b>{name} <span class="ci">{numbers}</span></b>{text}</div>'


def _samples(table: Any) -> str:
    parts = [f"<h2>Samples</h2><p class='sub'>the first {min(MAX_SAMPLES, table.num_rows)} of {table.num_rows}</p>"]
    sources = [name for name in ("reference", "sft", "policy") if name in table.column_names]
    for row in table.slice(0, MAX_SAMPLES).to_pylist():
        post = escape(str(row["post"]).strip())
        answers = "".join(_answer(row, source) for source in sources if row[source] is not None)
        parts.append(
            f'<details><summary>{escape(headline(str(row["post"])))}</summary><div class="post">{post}</div></details>'
            f'<div class="answers">{answers}</div>'
        )
    return "\n".join(parts)


def _answer(row: Mapping[str, Any], source: str) -> str:
    measures = ((kind, row.get(f"{kind}_{source}")) for kind in ("reward", "gold"))
    numbers = ", ".join(f"{kind} {value:.3f}" for kind, value in measures if value is not None)
    text = escape(row[source].strip()) or "<i>(empty)</i>"
    return f'<div><b>{escape(SOURCES[source].in_full)} <span class="ci">{numbers}</span></b>{text}</div>'
