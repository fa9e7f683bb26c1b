"""The tables of report.html: means with their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rayrlhf.reports.intervals import p_text
from rayrlhf.reports.measures import DIFFERENCES, EVALUATED, SCORERS, SOURCES, decimals


@dataclass(frozen=True)
class Cell:
    """A mean with its interval, in words."""

    mean: str
    interval: str
    p: str
    n: int


@dataclass(frozen=True)
class Table:
    """Rows of cells; None is a measure that is not there."""

    caption: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell | None, ...]], ...]


def evaluation_table(result: Mapping[str, Any]) -> Table:
    """evaluation.json: one row a measure, one column a source, and the paired differences."""
    sources = [name for name in reversed(SOURCES) if name in result]
    differences = result.get("differences", {})
    changes = {head: differences[name] for name, head in DIFFERENCES.items() if name in differences}
    columns = [*(result[source] for source in sources), *changes.values()]
    rows = []
    for name, words in EVALUATED.items():
        values = [column.get(name) for column in columns]
        means = [value["mean"] for value in values if value is not None]
        if means:
            rows.append((words, _cells(values, decimals(means))))
    known = result.get("metadata", {})
    caption = (
        f"{known.get('data', 'test split')}, {known.get('prompts', '?')} prompts; "
        f"labeller: {known.get('labeller', '?')}. "
        "Means with 95 % intervals over prompts (bootstrap; Wilson's for shares); "
        "win rates by the reward model unless it says gold, ties count half; "
        "p of the paired sign-flip test; at equal length: by regression on the difference in length."
    )
    heads = ("measure", *(SOURCES[name].in_full for name in sources), *changes)
    return Table(caption, heads, tuple(rows))


def accuracy_table(result: Mapping[str, Any]) -> Table:
    """reward_model.json: one row a scorer."""
    rows = [
        (SCORERS[name], _cells([accuracy, result["reward_model_minus"].get(name)], 3))
        for name, accuracy in result["accuracy"].items()
    ]
    caption = (
        f"{result['pairs']} held-out pairs of {result['prompts']} prompts: share ordered rightly, ties count half, "
        "with 95 % bootstrap intervals over prompts."
    )
    return Table(caption, ("ordered by", "accuracy", "reward model − it, paired"), tuple(rows))


def _cells(values: Sequence[Mapping[str, Any] | None], digits: int) -> tuple[Cell | None, ...]:
    return tuple(None if value is None else _cell(value, digits) for value in values)


def _cell(value: Mapping[str, Any], digits: int) -> Cell:
    mean, low, high = (f"{value[key]:z.{digits}f}".replace("-", "−") for key in ("mean", "low", "high"))
    return Cell(mean, f"{low} to {high}", p_text(value["p"]) if "p" in value else "", int(value["n"]))
