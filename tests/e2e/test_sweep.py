"""`rayrlhf sweep` on the shrunken quick start: shared stages, a trial that fails, the same command again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from rayrlhf.runs.metrics import read_metrics

ROOT = Path(__file__).parents[2]
STAGES = ("sft", "collect", "reward_model")


@pytest.mark.timeout(900)
def test_a_sweep_shares_ranks_and_continues(finished: Any, before_ppo: Path, start: Any, tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    search = {"ppo.optimizer.lr": {"grid": [1e-4, 3e-4]}}
    file.write_text(yaml.safe_dump({"config": str(ROOT / finished.arguments[0]), "name": "search", "search": search}))
    folder = tmp_path / "search"
    shutil.copytree(before_ppo, folder / "base")  # SFT and comparisons are there: the sweep trains the reward model
    shutil.rmtree(folder / "base" / "reward_model")
    names = ["lr-0.0001", "lr-0.0003"]
    good, bad = (folder / name for name in names)
    bad.mkdir()
    (bad / "checkpoints").touch()  # PPO cannot put its checkpoints there
    changes = [word for word in finished.arguments[1:] if not word.startswith(("name=", "runs_dir="))]
    arguments = ["sweep", str(file), f"runs_dir={tmp_path}", *changes, "ppo.steps=1"]

    first = start("rayrlhf", *arguments).wait(600)
    assert first.code == 1, first.out + first.err
    assert first.err == "failed: 1 of 2 trials failed; the same command tries them again\n"
    lines = first.out.splitlines()
    assert sum(line.startswith("reward_model: done in") for line in lines) == 1
    assert any(line.startswith("sft: already done") for line in lines)
    for name in names:
        assert any(f" {name}: started, see {folder / name / 'log.txt'}" in line for line in lines)
    assert any(f" {names[0]}: policy.gold 0." in line and "ETA" in line for line in lines)
    assert any(f" {names[1]}: failed: FileExistsError: " in line for line in lines)
    assert not (bad / "evaluation.json").exists() and "FileExistsError" in (bad / "log.txt").read_text()
    record = json.loads((folder / "sweep.json").read_text())
    assert [trial["name"] for trial in record["trials"]] == names
    assert record["best"] == names[0] and record["trials"][1]["state"].startswith("failed: FileExistsError")

    done = (good / "evaluation.json").stat().st_mtime_ns
    (bad / "checkpoints").unlink()
    second = start("rayrlhf", *arguments).wait(600)
    assert second.code == 0, second.out + second.err
    assert f" {names[0]}: started" not in second.out and f" {names[1]}: started" in second.out
    assert (good / "evaluation.json").stat().st_mtime_ns == done

    for trial in (good, bad):
        for output in ("sft/model.safetensors", "comparisons.parquet", "reward_model/model.safetensors"):
            assert (trial / output).samefile(folder / "base" / output)
        log = (trial / "log.txt").read_text()
        assert all(f"{stage}: already done" in log for stage in STAGES) and "ppo 1/1 " in log
        times = {name for line in read_metrics(trial, "run") for name in line if name.startswith("time/")}
        assert times >= {f"time/{stage}" for stage in (*STAGES, "ppo", "evaluate")}
        assert "Reward model" in (trial / "report.html").read_text()
        evaluation = json.loads((trial / "evaluation.json").read_text())
        assert evaluation["metadata"]["data"] == "embedded:tldr, dev split"
        own = next(t for t in json.loads((folder / "sweep.json").read_text())["trials"] if t["name"] == trial.name)
        assert own["measures"]["policy.gold"] == evaluation["policy"]["gold"]
        assert own["measures"]["policy_minus_sft.gold"] == evaluation["differences"]["policy_minus_sft"]["gold"]
        assert own["seconds"] < 300
    configs = [yaml.safe_load((trial / "config.yaml").read_text()) for trial in (good, bad)]
    for config, name, lr in zip(configs, names, (1e-4, 3e-4), strict=True):
        assert config.pop("name") == name
        assert config["ppo"]["optimizer"].pop("lr") == lr
    assert configs[0] == configs[1]  # nothing but what was swept
    assert (good / "policy" / "model.safetensors").read_bytes() != (bad / "policy" / "model.safetensors").read_bytes()

    again = start("rayrlhf", *arguments)
    third = again.wait(120)
    assert third.code == 0
    assert "sweep 'search' is finished: all 2 trials were done before" in third.out
    assert "rayrlhf run configs/quickstart.yaml name=search-best " in third.out
    assert not any(again.ray_directory.iterdir()), "no cluster is needed to say this"
