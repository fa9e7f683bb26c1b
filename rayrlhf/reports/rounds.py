"""The rounds of a run side by side: tables for the terminal, and the run's report.html with its curves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table

from rayrlhf.files import replacing
from rayrlhf.reports.curves import GOLD, OTHER, PROXY, style
from rayrlhf.reports.evaluation import PREVIOUS
from rayrlhf.reports.measures import interval_text
from rayrlhf.reports.page.frame import document, inline
from rayrlhf.reports.round_measures import IntervalDict, RoundResult
from rayrlhf.runs.folder import RunFolder
from rayrlhf.runs.rounds import round_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Column = Callable[[RoundResult], IntervalDict | None]
Series = tuple[str, str, Mapping[int, IntervalDict | None]]
"""Label, colour, and a value by round."""
COLUMNS: dict[str, Column] = {
    "gold": lambda result: result.measure("gold"),
    "reward": lambda result: result.measure("reward"),
    "KL to SFT": lambda result: result.measure("kl"),
    "length": lambda result: result.measure("length"),
    "wins over the round before": lambda result: result.win_rate(PREVIOUS),
    "wins over SFT": lambda result: result.win_rate("sft"),
}
"""What the first table shows of each round."""
CAPTION = (
    "policy of each round, mean [95 % interval over prompts]; win rates by gold where it is measured; a reward is "
    "that of the round's own reward model, so rewards of two rounds are not on one scale"
)
ACCURACY_CAPTION = (
    "each round's reward model on held-out comparisons: share of pairs ordered rightly [95 % interval over prompts], "
    "and mean confidence, which equals that share in a calibrated model"
)


def rows(results: Sequence[RoundResult]) -> list[list[str]]:
    """The cells of the first table, headings first."""
    body = [[str(result.number), *(interval_text(of(result)) for of in COLUMNS.values())] for result in results]
    return [["round", *COLUMNS], *body]


def accuracy_rows(results: Sequence[RoundResult]) -> list[list[str]]:
    """The cells of the second table, headings first: a row for each reward model, a column for each round's
    comparisons. It is [] where no round has a reward model."""
    measured = [result for result in results if result.heldout]
    if not measured:
        return []
    sources = sorted({source for result in measured for source in result.heldout})
    body = []
    for result in measured:
        cells = []
        for source in sources:
            found = result.heldout.get(source)
            cells.append("–" if found is None else f"{interval_text(found.accuracy)}, confident {found.confidence:.3f}")
        body.append([str(result.number), *cells])
    return [["reward model of round", *(f"comparisons of round {source}" for source in sources)], *body]


def rounds_table(results: Sequence[RoundResult]) -> Group:
    """Both tables for the terminal."""
    tables = [_table(CAPTION, rows(results))]
    if accuracy := accuracy_rows(results):
        tables.append(_table(f"\n{ACCURACY_CAPTION}", accuracy))
    return Group(*tables)


def rounds_figure(results: Sequence[RoundResult]) -> Figure | None:
    """Gold, reward, accuracy of the reward model, win rates and KL over the rounds; None before the first is done."""
    from matplotlib.figure import Figure  # not pyplot: it keeps figures alive

    finished = [result for result in results if result.evaluation is not None]
    if not finished:
        return None
    sft = finished[0].evaluation["sft"] if finished[0].evaluation else {}
    gold, kl, wins, wins_sft = (
        _by_round(finished, COLUMNS[name])
        for name in ("gold", "KL to SFT", "wins over the round before", "wins over SFT")
    )
    own = _by_round(finished, lambda result: _accuracy(result, result.number))
    first = _by_round(finished, lambda result: _accuracy(result, 1))
    panels: list[tuple[str, str, list[Series]]] = [
        ("Gold; round 0 is SFT", "gold", [("policy", GOLD, {0: sft.get("gold"), **gold})]),
        ("Reward minus the round before", "score", [("policy", PROXY, _by_round(finished, _reward_change))]),
        ("Reward model", "accuracy", [("its own round", PROXY, own), ("comparisons of round 1", OTHER, first)]),
        ("Win rates", "share of prompts", [("over the round before", GOLD, wins), ("over SFT", OTHER, wins_sft)]),
        ("KL to the SFT model", "nats per response", [("policy", OTHER, kl)]),
    ]
    shown = [panel for panel in panels if any(value for _, _, points in panel[2] for value in points.values())]
    figure = Figure(figsize=(4.2 * min(3, len(shown)), 2.7 * -(-len(shown) // 3)), layout="constrained")
    grid = figure.subplots(-(-len(shown) // 3), min(3, len(shown)), squeeze=False)
    for axes, (title, unit, series) in zip(grid.flat, shown, strict=False):
        _draw(axes, series, half=title == "Win rates")
        style(axes, title, unit, "round")
    for axes in list(grid.flat)[len(shown) :]:
        axes.remove()
    return figure


def write_rounds_report(run: RunFolder, results: Sequence[RoundResult], stopped: str | None) -> Path:
    """Write report.html of a run in rounds, finished or not, and return its path."""
    figure = rounds_figure(results)
    html = document(
        "rounds.html",
        title=run.name,
        rounds=[round_name(result.number) for result in results],
        stopped=stopped,
        caption=CAPTION,
        rows=rows(results),
        figure=None if figure is None else inline(figure),
        accuracy_caption=ACCURACY_CAPTION,
        accuracy=accuracy_rows(results),
    )
    with replacing(run.report) as temporary:
        temporary.write_text(html, encoding="utf-8")
    return run.report


def _reward_change(result: RoundResult) -> IntervalDict | None:
    return result.change("reward")


def _accuracy(result: RoundResult, source: int) -> IntervalDict | None:
    return result.heldout[source].accuracy if source in result.heldout else None


def _by_round(results: Sequence[RoundResult], of: Column) -> dict[int, IntervalDict | None]:
    return {result.number: of(result) for result in results}


def _draw(axes: Axes, series: Sequence[Series], *, half: bool) -> None:
    from matplotlib.ticker import MaxNLocator

    for label, colour, points in series:
        known = [(number, value) for number, value in points.items() if value is not None]
        means = [value["mean"] for _, value in known]
        errors = [[v["mean"] - v["low"] for _, v in known], [v["high"] - v["mean"] for _, v in known]]
        numbers = [number for number, _ in known]
        axes.errorbar(numbers, means, errors, label=label, color=colour, marker="o", markersize=3, capsize=3)
    if half:
        axes.axhline(0.5, color=OTHER, linewidth=0.8, linestyle=":")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(series) > 1:
        axes.legend(fontsize=8, frameon=False)


def _table(title: str, cells: Sequence[Sequence[str]]) -> Table:
    headings, *body = cells
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for heading in headings:
        table.add_column(heading, justify="right", overflow="fold")
    for row in body:
        table.add_row(*(cell.replace(" [", "\n[").replace(", confident", ",\nconfident") for cell in row))
    return table
