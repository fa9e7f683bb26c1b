"""Tables of the faults that runs have met."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any


def tables(records: Sequence[dict[str, Any]]) -> str:
    """Two tables in Markdown: the faults by what they struck, and what they cost."""
    by_kind = defaultdict(list)
    for record in records:
        by_kind[f"{record['kind']} {record['role']}".strip()].append(record)
    lines = [
        "| fault | met | the command went on | the same command went on | seconds to the next step, median [range] |",
        "| --- | --- | --- | --- | --- |",
    ]
    for kind, met in sorted(by_kind.items(), key=lambda item: -len(item[1])):
        again = sum(record["ended"] is not None for record in met)
        lines.append(f"| {kind} | {len(met)} | {len(met) - again} | {again} | {_seconds(met)} |")
    runs = {record["run"]: record for record in records}
    goodput = [record["undisturbed_seconds"] / record["run_seconds"] for record in runs.values()]
    return "\n".join(
        [
            *lines,
            "",
            f"{len(records)} faults, by stage: {_counts(Counter(record['stage'] for record in records))}",
            f"{len(runs)} runs: {_counts(_settings([record['setting'] for record in runs.values()]))}",
            f"goodput (undisturbed seconds / seconds with faults): {statistics.median(goodput):.2f} "
            f"[{min(goodput):.2f}, {max(goodput):.2f}]",
            f"steps done again: {sum(record['steps_done_again'] for record in runs.values())}",
        ]
    )


def _seconds(met: Sequence[dict[str, Any]]) -> str:
    known = [record["recovered_s"] for record in met if record["recovered_s"] is not None]
    return f"{statistics.median(known):.0f} [{min(known):.0f}, {max(known):.0f}]" if known else "–"


def _settings(settings: Sequence[dict[str, Any]]) -> dict[str, int]:
    """How many runs each special setting had."""
    return {
        "two learner ranks": sum(setting["ranks"] == 2 for setting in settings),
        "ahead": sum(setting["ahead"] for setting in settings),
        "several nodes": sum(setting["nodes"] for setting in settings),
        "slow network": sum(setting["slow_network"] for setting in settings),
    }


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())
