"""Figures of finished runs as Markdown tables: `python scripts/summarize_run.py RUN_FOLDER [RUN_FOLDER ...]`.

With several folders (the same config under several seeds) each figure is the median with the range.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rayrlhf.metrics import read_metrics
from rayrlhf.run import STAGES

MEASURES = ("reward", "gold", "rouge1", "rouge2", "rougeL", "length", "eos_rate", "win_rate_vs_sft", "kl")
SOURCES = ("title", "reference", "sft", "policy")


def spread(values: Sequence[float], form: str) -> str:
    """`median`, or `median (low to high)` of several."""
    text = format(median(values), form)
    return text if len(values) == 1 else f"{text} ({min(values):{form}} to {max(values):{form}})"


def stage_table(runs: Sequence[Path]) -> list[str]:
    """Seconds by stage, and tokens per second of the steps in each."""
    lines = ["| stage | seconds | tokens/s of a step, median |", "|---|---|---|"]
    for stage in STAGES:
        seconds = [
            line[f"time/{stage}"] for run in runs for line in read_metrics(run, "run") if f"time/{stage}" in line
        ]
        rates = [
            median(line["throughput/tokens_per_s"] for line in found if "throughput/tokens_per_s" in line)
            for run in runs
            if (found := read_metrics(run, stage)) and any("throughput/tokens_per_s" in line for line in found)
        ]
        lines.append(f"| {stage} | {spread(seconds, '.0f')} | {spread(rates, ',.0f') if rates else '–'} |")
    return lines


def phase_table(runs: Sequence[Path]) -> list[str]:
    """Where a PPO step's time goes."""
    steps = [line for run in runs for line in read_metrics(run, "ppo")]
    lines = ["| phase of a PPO step | seconds, median |", "|---|---|"]
    for phase in ("generate", "score", "learn", "sync", "step"):
        lines.append(f"| {phase} | {median(line[f'time/{phase}'] for line in steps):.2f} |")
    return lines


def evaluation_table(runs: Sequence[Path]) -> list[str]:
    """Means with 95 % intervals of one run; of several, medians and ranges of the means."""
    results: list[dict[str, Any]] = [json.loads((run / "evaluation.json").read_text()) for run in runs]

    def cell(measure: str, values: Sequence[dict[str, float] | None]) -> str:
        found = [value for value in values if value]
        if not found:
            return "–"
        if len(found) > 1:
            return spread([value["mean"] for value in found], ".3f")
        form = ".1f" if measure == "length" else ".3f"
        return f"{found[0]['mean']:{form}} [{found[0]['low']:{form}}, {found[0]['high']:{form}}]"

    lines = [f"| measure | {' | '.join(SOURCES)} | policy - sft, paired |", "|---" * (len(SOURCES) + 2) + "|"]
    for measure in MEASURES:
        cells = [cell(measure, [result[source].get(measure) for result in results]) for source in SOURCES]
        cells.append(cell(measure, [result["differences"]["policy_minus_sft"].get(measure) for result in results]))
        lines.append(f"| {measure} | {' | '.join(cells)} |")
    return lines


def main(arguments: Sequence[str]) -> None:
    if not arguments:
        sys.exit(__doc__)
    runs = [Path(argument) for argument in arguments]
    tables: tuple[Callable[[Sequence[Path]], list[str]], ...] = (stage_table, phase_table, evaluation_table)
    print("\n\n".join("\n".join(table(runs)) for table in tables))


if __name__ == "__main__":
    main(sys.argv[1:])
