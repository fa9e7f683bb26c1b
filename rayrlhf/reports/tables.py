"""Tables for the terminal of evaluation.json and reward_model.json: means with their 95 % intervals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table

from rayrlhf.reports.intervals import p_text
from rayrlhf.reports.measures import EVALUATED, SCORERS, SOURCES, interval_text


def evaluation_table(result: Mapping[str, Any]) -> Group:
    """evaluation.json as two tables: the means of each source, then policy minus SFT."""
    sources = [name for name in SOURCES if name in result]
    measured = {measure for name in ("policy", "sft") for measure in result.get(name, {})}
    measures = [measure for measure in EVALUATED if measure in measured]
    facts = result["metadata"]
    table = _narrow_table(f"{facts['data']}: {facts['prompts']} prompts, mean [95 % interval]")
    table.add_column("measure", no_wrap=True)
    for name in sources:
        table.add_column(SOURCES[name].words, justify="right")
    for measure in measures:
        row = [result[name].get(measure) for name in sources]
        if any(row):
            table.add_row(measure, *(interval_text(value) for value in row))
    differences = result.get("differences", {})
    if not differences:
        return Group(table)
    pairs = _narrow_table("\npolicy minus SFT on the same prompts")
    for heading in ("measure", "difference", "sign-flip test", "at equal length"):
        pairs.add_column(heading, justify="left" if heading == "measure" else "right")
    controlled = differences.get("policy_minus_sft_at_equal_length", {})
    for measure, value in differences["policy_minus_sft"].items():
        if value is not None:
            p = p_text(value["p"]) if "p" in value else "–"
            pairs.add_row(measure, interval_text(value), p, interval_text(controlled.get(measure)))
    return Group(table, pairs)


def _narrow_table(title: str) -> Table:
    """A table without padding: four sources and the longest name of a measure have to fit into a log's 120 columns."""
    padding = (0, 1, 0, 0)
    return Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=padding, pad_edge=False, show_edge=False)


def reward_accuracy_table(result: Mapping[str, Any]) -> Table:
    """reward_model.json as a table: one row for each scorer, with the paired difference to the reward model."""
    title = f"{result['pairs']} held-out pairs of {result['prompts']} prompts, mean [95 % interval]"
    table = Table("ordered by", title=title, title_justify="left", box=SIMPLE_HEAD)
    for heading in ("accuracy", "reward model minus it"):
        table.add_column(heading, justify="right")
    for name, accuracy in result["accuracy"].items():
        difference = result["reward_model_minus"].get(name)
        table.add_row(SCORERS[name], interval_text(accuracy), interval_text(difference))
    return table
