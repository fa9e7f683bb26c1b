"""Rewards by rules and by a game: no comparisons, no reward model, and a value model that starts as the SFT model."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from rayrlhf.runs.metrics import read_metrics
from tests.classifiers import BERT, write

ROOT = Path(__file__).parents[2]


def test_a_game_in_turns_without_a_reward_model(start: Any, tmp_path: Path) -> None:
    rows, rule = tmp_path / "guess.jsonl", tmp_path / "rule.py"
    subprocess.run([sys.executable, ROOT / "scripts/make_guess.py", rows], check=True)
    own = [json.loads(row) | {"cue": "Guess:"} for row in rows.read_text().splitlines()]
    rows.write_text("".join(json.dumps(row) + "\n" for row in own))
    rule.write_text(
        "def turns(responses, metadata):\n    return [-text.count(m['cue']) for text, m in zip(responses, metadata)]\n"
    )
    turns = f"{{kind: python, name: turns, path: '{rule}:turns', weight: 0.125, normalize: true}}"
    # A model from elsewhere, whose context no prompt fits. It counts for nothing here, so that the sums are known.
    taste = write(tmp_path / "taste", BERT, max_position_embeddings=12, num_labels=2)
    model = f"{{kind: model, name: taste, path: {taste}, label: 1, weight: 0.0}}"
    rewards = f"rewards=[{{kind: environment}}, {turns}, {model}]"
    changes = [f"data.demonstrations.path={rows}", f"runs_dir={tmp_path}", "sft.epochs=1", rewards]
    changes += ["evaluate.max_prompts=16", "evaluate.best_of=4", "data.min_response_tokens=1"]
    changes += [
        "rl.algorithm=ppo",
        "rl.steps=2",
        "rl.prompts_per_step=8",
        "rl.samples_per_prompt=2",
        "rl.max_redraws=1",
        "rl.missing_eos_reward=null",
    ]
    command = start("python", "-m", "jobs.pipeline", "--local", "--config", "configs/guess.yaml", *changes)
    command.wait_for_line(r"rl 1/2 ")
    # Python may start a helper of its own that watches semaphores; none of the roles is in it.
    ours = [pid for pid, line in command.processes().items() if "multiprocessing.resource_tracker" not in line]
    assert ours == [command.process.pid]
    outcome = command.wait()
    assert outcome.code == 0, outcome.err
    assert not any(command.ray_directory.iterdir()), "Ray was started"
    assert "reward 'taste' read 16 of 16 responses without the beginning of their prompts" in outcome.out
    assert outcome.out.count("reward 'taste' read") == 2, "once in each stage"
    assert "(reference policy, taste)" in outcome.out
    assert "collect" not in outcome.out and "reward_model" not in outcome.out
    run = tmp_path / "guess"
    assert {"sft", "policy", "evaluation.json", "report.html"} <= {path.name for path in run.iterdir()}
    assert not (run / "reward_model").exists() and not (run / "comparisons.parquet").exists()
    steps = read_metrics(run, "rl")
    assert [line["step"] for line in steps] == [1, 2] and all("rl/value_loss" in line for line in steps)
    for line in steps:
        assert 1 <= line["rollout/turns"] <= 3
        # A turn more is an observation more, which ends with "Guess:".
        assert line["rl/rewards/turns"] == pytest.approx(-0.125 * (line["rollout/turns"] - 1), abs=1e-6)
        assert 0 <= line["rl/rewards/environment"] <= 1
        assert 0 < line["rollout/redrawn"] <= 8, "of 16 responses to 8 prompts, no two with the same score"
        assert "rl/gold/mean" not in line, "a trajectory in turns is no answer"
        assert line["rl/prompts_cut/taste"] == line["rl/responses"] == 16 and line["rl/rewards/taste"] == 0.0
        # Normalised, `turns` has a mean of 0; the scores that are shown have it plain.
        assert line["rl/score/mean"] == pytest.approx(
            line["rl/rewards/environment"] + line["rl/rewards/turns"], abs=1e-6
        )
        penalty = line["rl/kl_coefficient"] * line["rl/kl"]
        assert line["rl/reward/mean"] == pytest.approx(line["rl/rewards/environment"] - penalty, abs=1e-6)
        assert line["rl/first_ratio_off_one"] < 1e-5 and line["rl/logprob_gap/max"] < 1e-3
    samples = pq.read_table(run / "samples.parquet").to_pylist()
    for row in samples:
        guess = re.search(r"\d+", row["policy"].rpartition("Guess:")[2])  # the first number of the last turn
        found = float(guess is not None and guess.group() == row["reference"])
        assert row["reward_policy"] == pytest.approx(found - 0.125 * row["policy"].count("Guess:"))
    evaluation = json.loads((run / "evaluation.json").read_text())
    mean = sum(row["reward_policy"] for row in samples) / len(samples)
    assert evaluation["policy"]["reward"]["mean"] == pytest.approx(mean)
    assert evaluation["reference"]["reward"] is None, "a text that is given cannot be played"
    for measure in ("gold", "rouge1", "rouge2", "rougeL"):
        assert evaluation["policy"][measure] is None and f"{measure}_policy" not in samples[0]
    assert evaluation["best_of"]["kl"]["mean"] == pytest.approx(math.log(4) - 3 / 4)
    assert "policy_minus_best_of" in evaluation["differences"]
