"""Results as Markdown, and where they go in docs/benchmarks.md: between the markers of each benchmark."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import RESULTS, ROOT, Comparison

DOCS = ROOT / "docs" / "benchmarks.md"


def as_markdown(record: Mapping[str, Any]) -> str:
    """The settings, the tables and where they were measured."""
    parts = []
    if record["not_run"]:
        parts.append(f"Not run: {record['not_run']}.")
    if record["settings"]:
        parts.append("\n".join(f"- {key}: {value}" for key, value in record["settings"].items()))
    if record["comparisons"]:
        parts.append(comparison_table([Comparison(**each) for each in record["comparisons"]]))
    if record["facts"]:
        rows = [[each["name"], interval(each["values"]), each["unit"]] for each in record["facts"]]
        parts.append(table(["measured", "median [range]", "unit"], rows))
    parts.append(where(record))
    return "\n\n".join(parts)


def comparison_table(comparisons: Sequence[Comparison]) -> str:
    rows = [
        [
            c.case, f"{interval(c.ours)} {c.unit}", f"{interval(c.theirs)} {c.unit}", c.against,
            f"**{c.ratio:.2f}** [{min(c.ratios):.2f}, {max(c.ratios):.2f}]", c.target,
        ]
        for c in comparisons
    ]  # fmt: skip
    return table(["", "rayrlhf", "the other", "what it is", "ratio, ours / other", "target"], rows)


def where(record: Mapping[str, Any]) -> str:
    machine = record["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    gpu = f", {machine['gpu']}" if machine["gpu"] else ", no GPU"
    return (
        f"<sub>{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB{gpu}; "
        f"Python {machine['python']}, {versions}; revision {machine['revision']}; "
        f"load average at the start {machine['load_average_at_start']}; {record['seconds']} s.</sub>"
    )


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def interval(values: Sequence[float]) -> str:
    """`median [min, max]`, to three significant digits."""
    if len(values) == 1:
        return number(values[0])
    return f"{number(statistics.median(values))} [{number(min(values))}, {number(max(values))}]"


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def write_docs(docs: Path = DOCS, results: Path = RESULTS) -> None:
    """Replace what stands between `<!-- bench:NAME -->` and `<!-- end -->` for every result there is.

    Raises:
        ValueError: a result whose markers the page does not have.
    """
    page = docs.read_text(encoding="utf-8")
    for path in sorted(results.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        marker = f"<!-- bench:{record['benchmark']} -->"
        pattern = re.compile(re.escape(marker) + r".*?<!-- end -->", re.DOTALL)
        if not pattern.search(page):
            raise ValueError(f"{docs.name} has no {marker} ... <!-- end -->")
        text = f"{marker}\n{as_markdown(record)}\n<!-- end -->"
        page = pattern.sub(lambda _, text=text: text, page)  # type: ignore[misc]
    docs.write_text(page, encoding="utf-8")
