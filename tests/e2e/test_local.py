"""`--local`: a stage in one process, so that a debugger works."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from jobs.reward_model import reward_model
from jobs.stage import run
from rayrlhf.config_file import load_config
from rayrlhf.runs.metrics import read_metrics

ROOT = Path(__file__).parents[2]


# test_rules and test_dpo are in one process, too; this one compares its samples with those on Ray.
@pytest.mark.long
def test_grpo_in_one_process(finished: Any, before_rl: Path, start: Any) -> None:
    """Another algorithm than the run on Ray had, without a value model, and with one reward more."""
    file = before_rl.parent / "brevity.py"
    file.write_text("def brevity(token_ids):\n    return [-len(ids) / 10 for ids in token_ids]\n")
    brevity = f"{{kind: python, name: brevity, path: '{file}:brevity', weight: 0.5}}"
    changes = ["rl.steps=2", "rl.algorithm=grpo", f"rewards=[{{kind: model}}, {brevity}]"]
    arguments = [*finished.arguments, f"runs_dir={before_rl.parent}", *changes]
    command = start("python", "-m", "jobs.rl", "--local", "--config", *arguments)
    outcome = command.wait()
    assert outcome.code == 0, outcome.err
    assert "rl: done in" in outcome.out
    lines = read_metrics(before_rl, "rl")
    assert [line["step"] for line in lines] == [1, 2]
    assert abs(lines[0]["rl/kl"]) < 1e-3
    assert all(line["rl/logprob_gap/mean"] < 1e-3 for line in lines)
    assert (before_rl / "policy" / "model.safetensors").is_file()
    assert not any("value" in name for line in lines for name in line)
    # The same prompts with the same seeds as in the run on Ray: the first batch is the same.
    on_ray = read_metrics(finished.path, "rl")[0]
    for name in ("rl/length/mean", "rl/eos_rate"):
        assert lines[0][name] == pytest.approx(on_ray[name], abs=1e-4)
    for line in lines:
        assert line["rl/rewards/brevity"] == pytest.approx(-0.05 * line["rl/length/mean"], rel=1e-5)
        assert line["rl/rewards/reward_model"] != 0.0


def test_reward_model_from_published_comparisons_without_a_split_of_its_own(
    finished: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """As the configs for published data have it: no post is kept for the reward model, people's pairs are given."""
    (tmp_path / "hh").mkdir()
    shutil.copytree(finished.path / "sft", tmp_path / "hh" / "sft")
    pairs = Path(__file__).parents[1] / "data" / "hh_harmless_small.jsonl.gz"
    arguments = [
        *finished.arguments,
        f"runs_dir={tmp_path}",
        "name=hh",
        "data.comparisons.format=hh_rlhf",
        f"data.comparisons.path={pairs}",
        "data.reward_model_fraction=0.0",
        "reward_model.max_comparisons=16",
    ]
    config, *overrides = arguments
    run(load_config(Path(__file__).parents[2] / config, overrides), [reward_model], local=True)
    out = capfd.readouterr().out
    assert "train comparisons from" in out
    lines = read_metrics(tmp_path / "hh", "reward_model")
    assert lines[0]["reward_model/prompts"] == 16
    assert lines[0]["reward_model/heldout_prompts"] > 0, "max_comparisons is about training"
    assert lines[-1]["reward_model/reward_bias"] != 0.0
    assert (tmp_path / "hh" / "reward_model" / "model.safetensors").is_file()
    measured = json.loads((tmp_path / "hh" / "reward_model.json").read_text())
    assert measured["accuracy"]["reward_model"]["mean"] == lines[-1]["reward_model/heldout_accuracy"]
    assert f"{measured['pairs']} held-out pairs of" in out and "SFT log-prob, sum" in out
