"""A run whose reward is a rule: no comparisons, no reward model, and a value model that starts as the SFT model."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from rayrlhf.runs.metrics import read_metrics

ROOT = Path(__file__).parents[2]


def test_sums_without_a_reward_model(start: Any, tmp_path: Path) -> None:
    rows = tmp_path / "sums.jsonl"
    subprocess.run([sys.executable, ROOT / "scripts/make_arithmetic.py", rows], check=True)
    changes = [
        f"data.demonstrations.path={rows}",
        f"runs_dir={tmp_path}",
        "sft.epochs=1",
        "evaluate.max_prompts=16",
        "evaluate.best_of=4",
    ]
    changes += ["rl.algorithm=ppo", "rl.steps=2", "rl.prompts_per_step=8", "rl.samples_per_prompt=2"]
    command = start("python", "-m", "jobs.pipeline", "--local", "--config", "configs/arithmetic.yaml", *changes)
    outcome = command.wait()
    assert outcome.code == 0, outcome.err
    assert "collect" not in outcome.out and "reward_model" not in outcome.out
    run = tmp_path / "arithmetic"
    assert {"sft", "policy", "evaluation.json", "report.html"} <= {path.name for path in run.iterdir()}
    assert not (run / "reward_model").exists() and not (run / "comparisons.parquet").exists()
    steps = read_metrics(run, "rl")
    assert [line["step"] for line in steps] == [1, 2] and all("rl/value_loss" in line for line in steps)
    samples = pq.read_table(run / "samples.parquet").to_pylist()
    exact = [float(row["policy"].strip() == row["reference"].strip()) for row in samples]
    assert [row["reward_policy"] for row in samples] == exact
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert evaluation["policy"]["reward"]["mean"] == pytest.approx(sum(exact) / len(exact))
    assert evaluation["reference"]["reward"]["mean"] == 1.0
    assert evaluation["best_of"]["kl"]["mean"] == pytest.approx(math.log(4) - 3 / 4)
    assert "policy_minus_best_of" in evaluation["differences"]
