"""The numbers of a run that must stay when the code around them changes: `python -m tests.golden RUN_FOLDER`.

tests/data/golden_quickstart.json holds those of the shrunken quick start (tests/commands.py), see
tests/data/README.md. Only a change that is meant to change what a run computes writes them anew.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from rayrlhf.runs.metrics import read_metrics

TEXTS = 4
"""Answers of each model that are compared."""
_OTHER = ("time", "throughput/", "memory/", "idle/", "step", "stage", "note", "sample", "warnings", "rl/weight_version")
"""Metrics of the machine, and counters whose start may change, by how their names begin. Beside them, each start of a
stage says in its first line how many steps there are, so a run that was continued says it in more lines."""


def golden_numbers(run: Path) -> dict[str, Any]:
    """By stage the numbers of each of its steps, the means of the evaluation, and what the models answered."""
    stages: dict[str, list[dict[str, float]]] = {}
    for stage in ("sft", "reward_model", "rl"):
        lines = [
            {name: value for name, value in line.items() if not name.startswith(_OTHER) and name != f"{stage}/steps"}
            for line in read_metrics(run, stage)
        ]
        stages[stage] = [line for line in lines if line]
    evaluation = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    accuracy = json.loads((run / "reward_model.json").read_text(encoding="utf-8"))["accuracy"]
    samples = pq.read_table(run / "samples.parquet", columns=["sft", "policy"]).slice(0, TEXTS)
    return {
        "stages": stages,
        "evaluation": {source: _means(evaluation[source]) for source in ("sft", "policy", "title", "reference")},
        "reward_model": _means(accuracy),
        "answers": samples.to_pydict(),
    }


def _means(measures: dict[str, Any]) -> dict[str, float]:
    return {name: interval["mean"] for name, interval in measures.items() if interval is not None}


if __name__ == "__main__":
    print(json.dumps(golden_numbers(Path(sys.argv[1])), indent=1))
