"""Runs whose config names their stages: without rollouts in training, and with RL after them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from rayrlhf.runs.metrics import read_metrics

STAGES = "stages=[sft, collect, dpo, evaluate]"
DPO = ("dpo.optimizer.lr=1e-4", "dpo.prompts_per_batch=4")


def distance(one: Path, other: Path) -> float:
    ours, theirs = (load_file(path / "model.safetensors") for path in (one, other))
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours if ours[name].dtype == torch.float32)


# Four stages more, for what ray/test_dpo shows of the stage itself.
@pytest.mark.long
def test_preferences_without_rollouts(finished: Any, start: Any, tmp_path: Path) -> None:
    run = tmp_path / finished.path.name
    arguments = [*finished.arguments, f"runs_dir={tmp_path}", f"from={finished.path}", STAGES, *DPO]
    outcome = start("python", "-m", "jobs.pipeline", "--local", "--config", *arguments).wait()
    assert outcome.code == 0, outcome.err
    # Without `rl`, `collect` has more prompts than that of the other run had.
    assert "sft is taken over; collect, dpo, evaluate anew: stages was" in outcome.out
    assert json.loads((run / "shared.json").read_text())["stages"] == ["sft"]
    assert "sft: already done" in outcome.out and "dpo (dpo): all answers" in outcome.out
    assert {"dpo", "evaluation.json", "report.html"} <= {path.name for path in run.iterdir()}
    assert not (run / "reward_model").exists() and not (run / "policy").exists()
    steps = [line for line in read_metrics(run, "dpo") if "dpo/loss" in line]
    assert steps[0]["dpo/loss"] == pytest.approx(0.6931, abs=1e-3)
    assert distance(run / "dpo", run / "sft") > 1e-5
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert evaluation["policy"]["reward"] is None and evaluation["policy"]["rougeL"] is not None
    assert evaluation["policy"]["kl"] is not None and evaluation["differences"]["policy_minus_sft"]["gold"] is not None
    assert "policy" in pq.read_table(run / "samples.parquet").column_names
    report = (run / "report.html").read_text()
    assert "Implicit reward of both sides" in report


# On Ray, and with RL: a start of all actors for what other tests show in parts.
@pytest.mark.long
def test_rl_starts_from_the_model_of_dpo(finished: Any, start: Any, tmp_path: Path) -> None:
    run = tmp_path / finished.path.name
    stages = "stages=[sft, collect, reward_model, dpo, rl, evaluate]"
    changes = [f"runs_dir={tmp_path}", f"from={finished.path}", stages, *DPO, "rl.steps=1"]
    outcome = start("rayrlhf", "run", *finished.arguments, *changes).wait()
    assert outcome.code == 0, outcome.err
    (step,) = read_metrics(run, "rl")
    assert abs(step["rl/kl"]) < 1e-2, "the reference of the first step is the policy itself"
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert evaluation["dpo"]["kl"] is not None and "policy_minus_dpo" in evaluation["differences"]
    assert distance(run / "policy", run / "dpo") < distance(run / "policy", run / "sft")
