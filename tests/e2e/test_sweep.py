"""`rayrlhf sweep` on the shrunken quick start: shared stages, a trial that fails, the same command again."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from rayrlhf.runs.metrics import read_metrics

# A reward model, PPO and an evaluation; ray/test_sweep and unit/test_sweep hold what is shared, ranked and done again.
pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
STAGES = ("sft", "collect", "reward_model")
NAMES = ["lr-0.0001", "lr-0.0003"]


@dataclass(frozen=True)
class Swept:
    """A sweep over two trials, the second of which could not write its checkpoints."""

    folder: Path
    arguments: list[str]
    outcome: Any

    @property
    def good(self) -> Path:
        return self.folder / NAMES[0]

    @property
    def bad(self) -> Path:
        return self.folder / NAMES[1]

    def record(self) -> dict[str, Any]:
        record: dict[str, Any] = json.loads((self.folder / "sweep.json").read_text())
        return record


@pytest.fixture(scope="module")
def swept(finished: Any, start: Any, tmp_path_factory: pytest.TempPathFactory) -> Swept:
    directory = tmp_path_factory.mktemp("sweep")
    file = directory / "sweep.yaml"
    search = {"rl.optimizer.lr": {"grid": [1e-4, 3e-4]}}
    file.write_text(yaml.safe_dump({"config": str(ROOT / finished.arguments[0]), "name": "search", "search": search}))
    folder = directory / "search"
    folder.mkdir()
    # SFT and comparisons are there: the sweep trains the reward model.
    finished.copy_before_rl(folder).rename(folder / "base")
    shutil.rmtree(folder / "base" / "reward_model")
    changes = [word for word in finished.arguments[1:] if not word.startswith(("name=", "runs_dir="))]
    found = Swept(folder, ["sweep", str(file), f"runs_dir={directory}", *changes, "rl.steps=1"], None)
    found.bad.mkdir()
    (found.bad / "checkpoints").touch()  # PPO cannot put its checkpoints there
    return replace(found, outcome=start("rayrlhf", *found.arguments).wait())


def check_trial(swept: Swept, trial: Path) -> None:
    """A finished one: what it shares with the others, and its measures."""
    for output in ("sft/model.safetensors", "comparisons.parquet", "reward_model/model.safetensors"):
        assert (trial / output).samefile(swept.folder / "base" / output)
    log = (trial / "log.txt").read_text()
    assert all(f"{stage}: already done" in log for stage in STAGES) and "rl 1/1 " in log
    times = {name for line in read_metrics(trial, "run") for name in line if name.startswith("time/")}
    assert times >= {f"time/{stage}" for stage in (*STAGES, "rl", "evaluate")}
    assert "Reward model" in (trial / "report.html").read_text()
    evaluation = json.loads((trial / "evaluation.json").read_text())
    assert evaluation["metadata"]["data"] == "embedded:tldr, dev split"
    own = next(t for t in swept.record()["trials"] if t["name"] == trial.name)
    assert own["measures"]["policy.gold"] == evaluation["policy"]["gold"]
    assert own["measures"]["policy_minus_sft.gold"] == evaluation["differences"]["policy_minus_sft"]["gold"]
    assert own["seconds"] > 0


def test_a_sweep_shares_stages_and_ranks_what_did_not_fail(swept: Swept) -> None:
    first = swept.outcome
    assert first.code == 1, first.out + first.err
    assert first.err == "failed: 1 of 2 trials failed; the same command tries them again\n"
    lines = first.out.splitlines()
    assert sum(line.startswith("reward_model: done in") for line in lines) == 1
    assert any(line.startswith("sft: already done") for line in lines)
    for name in NAMES:
        assert any(f" {name}: started, see {swept.folder / name / 'log.txt'}" in line for line in lines)
    assert any(f" {NAMES[0]}: policy.gold 0." in line and "ETA" in line for line in lines)
    assert any(f" {NAMES[1]}: failed: FileExistsError: " in line for line in lines)
    assert not (swept.bad / "evaluation.json").exists()
    assert "FileExistsError" in (swept.bad / "log.txt").read_text()
    record = swept.record()
    assert [trial["name"] for trial in record["trials"]] == NAMES
    assert record["best"] == NAMES[0] and record["trials"][1]["state"].startswith("failed: FileExistsError")
    check_trial(swept, swept.good)


def test_the_same_command_tries_again_what_failed(swept: Swept, start: Any) -> None:
    done = (swept.good / "evaluation.json").stat().st_mtime_ns
    (swept.bad / "checkpoints").unlink()
    second = start("rayrlhf", *swept.arguments).wait()
    assert second.code == 0, second.out + second.err
    assert f" {NAMES[0]}: started" not in second.out and f" {NAMES[1]}: started" in second.out
    assert (swept.good / "evaluation.json").stat().st_mtime_ns == done
    check_trial(swept, swept.bad)
    configs = [yaml.safe_load((trial / "config.yaml").read_text()) for trial in (swept.good, swept.bad)]
    for config, name, lr in zip(configs, NAMES, (1e-4, 3e-4), strict=True):
        assert config.pop("name") == name
        assert config["rl"]["optimizer"].pop("lr") == lr
    assert configs[0] == configs[1]  # nothing but what was swept
    policies = [(trial / "policy" / "model.safetensors").read_bytes() for trial in (swept.good, swept.bad)]
    assert policies[0] != policies[1]

    again = start("rayrlhf", *swept.arguments)
    third = again.wait()
    assert third.code == 0
    assert "sweep 'search' is finished: all 2 trials were done before" in third.out
    assert "rayrlhf run configs/quickstart.yaml name=search-best " in third.out
    assert not any(again.ray_directory.iterdir()), "no cluster is needed to say this"
