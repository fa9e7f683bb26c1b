"""compare.html: the tables of `rayrlhf compare`, and curves of several runs that can be read and zoomed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean

from markdown_it import MarkdownIt
from markupsafe import Markup

from rayrlhf.reports.curves import CURVES
from rayrlhf.reports.measures import Panel
from rayrlhf.reports.page.charts import Chart, Charts, Lines, Series, over_kl_chart
from rayrlhf.reports.page.frame import document

# Markup of its own, such as in the name of a run, is escaped.
_markdown = MarkdownIt("commonmark", {"html": False}).enable("table").disable("image")


def compared_page(text: str, runs: Mapping[str, Lines]) -> str:
    """The page.

    Args:
        text: the tables, Markdown.
        runs: lines of stage `rl`, by the run's name.
    """
    charts = Charts()
    places = charts.add(compared_charts(runs))
    data = {"charts": [chart.data() for chart in charts.all], "samples": [], "tokens": [], "seed": 0}
    title = ", ".join(runs)
    return document("compare.html", data, title=title, text=Markup(_markdown.render(text)), places=places)


def compared_charts(runs: Mapping[str, Lines]) -> list[Chart]:
    """One chart for each compared measure of `rl`, with a curve for each run; then proxy and gold against KL."""
    found = [_over_steps(panel, runs) for panel in CURVES]
    return [chart for chart in [*found, _over_kl(runs)] if chart is not None]


def _over_steps(panel: Panel, runs: Mapping[str, Lines]) -> Chart | None:
    name = panel.measures[0].name
    known = {
        run: {line["step"]: line[name] for line in lines if line.get(name) is not None} for run, lines in runs.items()
    }
    known = {run: values for run, values in known.items() if values}
    if not known:
        return None
    steps = sorted({step for values in known.values() for step in values})
    series = [Series(run, [values.get(step) for step in steps]) for run, values in known.items()]
    if len(series) > 1:
        series.append(
            Series(
                f"mean of {len(series)} runs",
                [_mean(values) for values in zip(*(s.values for s in series), strict=True)],
                role="mean",
            )
        )
    return Chart(panel.title, panel.unit, "step", [float(step) for step in steps], series, sync="rl")


def _over_kl(runs: Mapping[str, Lines]) -> Chart | None:
    """The curves of all runs; each has KLs of its own, so that at one x there is a value of one run alone."""
    found = {run: chart for run, lines in runs.items() if (chart := over_kl_chart(lines)) is not None}
    if not found:
        return None
    x = sorted({at for chart in found.values() for at in chart.x})
    series = []
    for run, chart in found.items():
        for each in chart.series:
            values = dict(zip(chart.x, each.values, strict=True))
            series.append(Series(f"{run}: {each.words}", [values.get(at) for at in x], role=each.role))
    return replace(
        next(iter(found.values())), x=x, series=series, note="Where the two part, the reward model is over-optimised."
    )


def _mean(values: Sequence[float | None]) -> float | None:
    """None where a run has no value: a mean of other runs would jump."""
    known = [value for value in values if value is not None]
    return fmean(known) if len(known) == len(values) else None
