"""Figures of RL: measures over steps with intervals, for one run or several seeds; proxy and gold against KL.

Thin lines are runs, thick lines are means over runs. A line is smoothed by a centred moving average.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import ndtri

from rayrlhf.reports.intervals import t_interval
from rayrlhf.reports.measures import MEASURES, PANELS, SOURCES, Panel
from rayrlhf.reports.shares import limits
from rayrlhf.resampling import CONFIDENCE, Array, Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Lines = Sequence[Mapping[str, Any]]
"""Lines of stage `rl` of one run's metrics.jsonl, as `read_metrics` gives them."""

SMOOTHING = 5
"""Steps of the moving average; fewer for runs under 30 steps."""
# Okabe and Ito's palette, which the colour-blind tell apart.
PROXY, GOLD, OTHER = "#0072b2", "#d55e00", "#4d4d4d"
_SOURCE_COLOURS = {"title": "#b3b3b3", "sft": "#56b4e9", "best_of": "#cc79a7", "policy": PROXY}
_ROUGE = {name: words for name, words in MEASURES.items() if name.startswith("rouge")}
_MUTED = "#677083"


CURVES = tuple(panel for panel in PANELS["rl"] if panel.compared)
_KL = "rl/kl"
_OPTIMISED = CURVES[:2]
"""Proxy and gold: `rl` raises the one, and people want the other."""


@dataclass(frozen=True)
class Curve:
    """One run's smoothed measure, [steps] each. `half` of its interval is NaN where no spread was measured."""

    steps: Array
    values: Array
    half: Array


def curve(lines: Lines, panel: Panel) -> Curve | None:
    """The smoothed curve of one run and of the panel's first measure; None where that was never written.

    `half` is half the width of the smoothed value's interval. Responses of different steps are independent draws, so
    their squared standard errors std² / n add up, each with the squared weight of its step.
    """
    known = [line for line in lines if line.get(panel.measures[0].name) is not None]
    return _smoothed(known, panel) if known else None


def moving_average(n: int) -> Array:
    """[n, n] weights of a centred moving average over `SMOOTHING` steps, fewer near both ends and for few steps.

    Near an end the window shrinks on both sides, so that a trend is not bent and the first value is as measured.
    """
    half = np.minimum(np.minimum(np.arange(n), np.arange(n)[::-1]), min(SMOOTHING // 2, n // 15))
    inside = np.abs(np.subtract.outer(np.arange(n), np.arange(n))) <= half[:, None]
    return inside / inside.sum(axis=1, keepdims=True)


def compare_figure(runs: Sequence[Lines], rouge: Mapping[str, Mapping[str, Interval]]) -> Figure:
    """Curves of one or more runs over RL steps, proxy and gold against KL, and the ROUGE of the evaluation.

    A panel is left out where no run has its metric.

    Args:
        runs: each run's lines of stage `rl`.
        rouge: by source (`title`, `sft`, `policy`), then by measure (`rouge1`, ...).
    """
    # Not pyplot: it keeps figures alive and picks a back end for the whole process.
    from matplotlib.figure import Figure

    over_steps = {panel.title: (panel, [c for lines in runs if (c := curve(lines, panel))]) for panel in CURVES}
    cells: list[Any] = [title for title, (_, curves) in over_steps.items() if curves]
    paths = [path for lines in runs if (path := path_over_kl(lines))]
    last = ["kl", "kl", "rouge"] if paths else ["rouge"]
    cells += last[::-1] if len(cells) % 3 == 2 else last  # what is two columns wide has to fit into one row
    cells += ["."] * (-len(cells) % 3)
    rows = len(cells) // 3
    figure = Figure(figsize=(11, 2.75 * rows + 0.3), layout="constrained")
    panels = figure.subplot_mosaic([cells[3 * row : 3 * row + 3] for row in range(rows)])
    for cell, axes in panels.items():
        if cell == "rouge":
            _draw_rouge(axes, rouge)
        elif cell == "kl":
            _draw_over_kl(axes, paths)
        else:
            _draw_over_steps(axes, *over_steps[cell])
    figure.legend(handles=_key(len(runs)), loc="outside upper center", ncols=3, fontsize=9, frameon=False)
    return figure


@dataclass(frozen=True)
class KLPath:
    """One run's gains over KL: [steps] each, in the order of KL."""

    root_kl: Array
    gains: Mapping[str, Curve]
    """By metric."""


def path_over_kl(lines: Lines) -> KLPath | None:
    """Proxy and gold against the square root of KL, as in Gao et al. 2023; None where the metrics lack one of them.

    A gain is the change since the first step, in standard deviations over that step's responses: so both are on one
    scale. While gold follows the proxy, the two rise together; where the proxy is over-optimised, they part. Steps are
    smoothed in the order of their KL. The intervals do not include the error of the first step.

    Source: Gao, Schulman & Hilton 2023, Scaling Laws for Reward Model Overoptimization.
    """
    needed = {name for panel in _OPTIMISED for name in (_KL, panel.measures[0].name, panel.measures[0].spread)}
    known = [line for line in lines if all(line.get(name) is not None for name in needed)]
    if not known or not all(known[0][panel.measures[0].spread] for panel in _OPTIMISED):
        return None
    ordered = sorted(known, key=lambda line: line[_KL])
    gains = {}
    for panel in _OPTIMISED:
        measure = panel.measures[0]
        start, spread = known[0][measure.name], known[0][measure.spread]
        smooth = _smoothed(ordered, panel)
        gains[measure.name] = Curve(smooth.steps, (smooth.values - start) / spread, smooth.half / spread)
    kl = moving_average(len(ordered)) @ np.array([line[_KL] for line in ordered], dtype=np.float64)
    return KLPath(np.sqrt(np.maximum(kl, 0)), gains)  # an estimate of a KL near 0 can be below it


def over_kl_figure(lines: Lines) -> Figure | None:
    """Proxy and gold of one run against KL; None where the metrics lack one of them."""
    from matplotlib.figure import Figure

    path = path_over_kl(lines)
    if path is None:
        return None
    figure = Figure(figsize=(8.4, 3.2), layout="constrained")
    _draw_over_kl(figure.subplots(), [path])
    return figure


def _draw_over_kl(axes: Axes, paths: Sequence[KLPath]) -> None:
    last, right = (f(path.root_kl[-1] for path in paths) for f in (min, max))
    x = np.linspace(max(path.root_kl[0] for path in paths), last, 200)  # the KLs that every run has been through
    for panel in _OPTIMISED:
        colour, curves = _colour(panel), []
        for path in paths:
            c = path.gains[panel.measures[0].name]
            if len(paths) > 1:
                axes.plot(path.root_kl, c.values, **_one_run(colour))
            curves.append(Curve(x, np.interp(x, path.root_kl, c.values), np.interp(x, path.root_kl, c.half)))
        end = _draw_mean(axes, x, curves, panel)
        name = panel.title.split(":")[0]
        axes.annotate(name, (right, end), xytext=(8, 0), textcoords="offset points", color=colour, va="center")
    axes.axhline(0, color="#b9c0cd", linewidth=0.8)
    axes.margins(x=0.08)
    axes.set_xlim(left=0)
    words = _average_words(min(len(path.root_kl) for path in paths))
    style(axes, "Proxy and gold against KL", "gain since the start, SDs", f"√KL, KL in nats per response{words}")


def style(axes: Axes, title: str, unit: str, x: str) -> None:
    """Give a panel the look of all others: its title at the left, muted axes, a horizontal grid."""
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_ylabel(unit, fontsize=8, color=_MUTED)
    axes.set_xlabel(x, fontsize=8, color=_MUTED)
    axes.tick_params(labelsize=8, colors=_MUTED)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#b9c0cd")
    axes.grid(axis="y", color="#eceef3", linewidth=0.8)
    axes.set_axisbelow(True)


def _draw_over_steps(axes: Axes, panel: Panel, curves: Sequence[Curve]) -> None:
    from matplotlib.ticker import MaxNLocator

    steps = np.array(sorted(set.intersection(*(set(c.steps) for c in curves))))
    if len(curves) > 1:
        for c in curves:
            axes.plot(c.steps, c.values, **_one_run(_colour(panel)))
    _draw_mean(axes, steps, [_at(c, steps) for c in curves], panel)
    style(axes, panel.title, panel.unit, f"RL step{_average_words(len(steps))}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))


def _draw_mean(axes: Axes, x: Array, curves: Sequence[Curve], panel: Panel) -> float:
    """Draw the mean of curves that share `x`, with its interval; returns the mean's last value."""
    if len(curves) == 1:
        mean, half = curves[0].values, curves[0].half
    else:
        mean, half = t_interval(np.stack([c.values for c in curves]))
    if len(curves) != 2:  # the t interval over two runs is 13 standard errors wide: it would hide the curves
        low, high = limits(mean, half) if panel.unit == "share" else (mean - half, mean + half)
        axes.fill_between(x, low, high, color=_colour(panel), alpha=0.18, linewidth=0)
    axes.plot(x, mean, color=_colour(panel), linewidth=2.2)
    return float(mean[-1])


def _colour(panel: Panel) -> str:
    return dict(zip(_OPTIMISED, (PROXY, GOLD), strict=True)).get(panel, OTHER)


def _one_run(colour: str) -> dict[str, Any]:
    return {"color": colour, "linewidth": 0.7, "alpha": 0.55}


def _at(c: Curve, steps: Array) -> Curve:
    kept = np.isin(c.steps, steps)
    return Curve(c.steps[kept], c.values[kept], c.half[kept])


def _average_words(steps: int) -> str:
    window = int(np.count_nonzero(moving_average(steps)[steps // 2]))
    return f" (moving average of {window})" if window > 1 else ""


def _draw_rouge(axes: Axes, rouge: Mapping[str, Mapping[str, Interval]]) -> None:
    present = [source for source in _SOURCE_COLOURS if rouge.get(source)]
    width = 0.8 / max(1, len(present))
    for i, source in enumerate(present):
        label, colour = SOURCES[source].in_full, _SOURCE_COLOURS[source]
        found = [(column, rouge[source][name]) for column, name in enumerate(_ROUGE) if name in rouge[source]]
        x = [column + (i - (len(present) - 1) / 2) * width for column, _ in found]
        means = [value.mean for _, value in found]
        errors = [[v.mean - v.low for _, v in found], [v.high - v.mean for _, v in found]]
        axes.bar(x, means, 0.92 * width, color=colour, label=label)
        axes.errorbar(x, means, np.maximum(errors, 0), fmt="none", ecolor="#1f2430", elinewidth=1, capsize=2)
    axes.set_xticks(range(len(_ROUGE)), list(_ROUGE.values()))
    if present:
        axes.legend(fontsize=8, frameon=False)
    style(axes, "ROUGE on the evaluation's prompts", "F1", "")


def _smoothed(known: Lines, panel: Panel) -> Curve:
    names = ("step", panel.measures[0].name)
    steps, values = (np.array([line[name] for line in known], dtype=np.float64) for name in names)
    errors = np.array([_squared_error(line, panel) for line in known])
    weights = moving_average(len(steps))
    quantile = ndtri((1 + CONFIDENCE) / 2)
    return Curve(steps, weights @ values, quantile * np.sqrt(weights**2 @ errors))


def _squared_error(line: Mapping[str, Any], panel: Panel) -> float:
    """Squared standard error of a step's mean; NaN where the metrics do not tell."""
    n, measure = line.get("rl/responses"), panel.measures[0]
    if not n:
        return np.nan
    if panel.unit == "share":  # of responses that have something or do not: the mean says how they spread
        return float(line[measure.name] * (1 - line[measure.name]) / n)
    std = line.get(measure.spread)
    return np.nan if std is None else float(std**2 / n)


def _key(runs: int) -> list[Any]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    mean = Line2D([], [], color=OTHER, linewidth=2.2, label=f"mean of {runs} runs" if runs > 1 else "mean of a step")
    band = Patch(color=OTHER, alpha=0.18, label=f"95 % interval over {'runs (t)' if runs > 1 else 'responses'}")
    one = Line2D([], [], **_one_run(OTHER), label="one run")
    if runs == 1:
        return [mean, band]
    return [one, mean] if runs == 2 else [one, mean, band]
