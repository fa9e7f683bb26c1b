"""`rayrlhf export`: a directory that others load, with a card that says what is true; and its upload."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

from jobs.cli import app
from jobs.export import export
from rayrlhf.errors import UserError
from rayrlhf.models.loading import load_policy, load_reward_model
from rayrlhf.reports.card import place_of
from rayrlhf.runs.folder import RunFolder
from tests.finished import finished_run
from tests.hub import hub

IDS = [2, 100, 200, 300, 400]
LOADED = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
kind, directory, base = sys.argv[1:4]
ids = torch.tensor([json.loads(sys.argv[4])])
AutoTokenizer.from_pretrained(directory)
if kind == "adapters":
    from peft import PeftModel
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), directory)
elif kind == "reward":
    model = AutoModelForSequenceClassification.from_pretrained(directory)
else:
    model = AutoModelForCausalLM.from_pretrained(directory)
with torch.no_grad():
    logits = model(ids).logits[0].float()
if kind == "reward":
    print(json.dumps(logits[0].item() + model.config.reward_bias))
else:
    print(json.dumps(logits.log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[:, 0].tolist()))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return finished_run(tmp_path_factory.mktemp("full"))


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return finished_run(tmp_path_factory.mktemp("lora"), lora=True)


def loaded(kind: str, directory: Path, base: Path | str = "") -> Any:
    """What transformers computes, in a process that knows nothing of this package."""
    command = [sys.executable, "-I", "-c", LOADED, kind, str(directory), str(base), json.dumps(IDS)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=directory)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def logprobs(model: Path) -> np.ndarray:
    """[4] of the tokens behind the first, by the run's own loader."""
    with torch.no_grad():
        logits = load_policy(str(model))(torch.tensor([IDS])).logits[0]
    return logits.log_softmax(-1)[:-1].gather(1, torch.tensor(IDS[1:])[:, None])[:, 0].numpy()


def card(directory: Path) -> tuple[dict[str, Any], str]:
    """Front matter, and the text behind it."""
    _, front, text = (directory / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), text


def test_a_policy_computes_the_same_in_another_process(run: RunFolder, tmp_path: Path) -> None:
    target = tmp_path / "mine"
    export(str(run.path), target, license="apache-2.0")
    assert loaded("policy", target) == pytest.approx(logprobs(run.policy), abs=1e-6)
    assert {file.name for file in target.iterdir()} == {*(f.name for f in run.policy.iterdir()), "README.md"}
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]  # nothing temporary


def test_the_card_says_what_the_run_measured(run: RunFolder, tmp_path: Path) -> None:
    target = tmp_path / "mine"
    export(str(run.path), target, license="apache-2.0")
    front, text = card(target)
    assert front["license"] == "apache-2.0" and front["library_name"] == "transformers"
    assert front["pipeline_tag"] == "text-generation" and {"rlhf", "ppo"} <= set(front["tags"])
    assert "base_model" not in front and "datasets" not in front  # none of them is on the hub
    (model,) = front["model-index"]
    values = {each["type"]: each["value"] for result in model["results"] for each in result["metrics"]}
    assert values == {"gold": 0.375, "kl": 0.25}
    assert "| labeller's measure (gold) | 0.250 [0.125, 0.500] | 0.375 [0.125, 0.500] |" in text
    assert "2 prompts (embedded:tldr, test split)" in text
    assert "| RL | 2 |" in text and "| Supervised fine-tuning | 3 |" in text
    assert 'AutoModelForCausalLM.from_pretrained("mine")' in text and "max_new_tokens=8" in text
    assert str(run.path) not in text and "embedded:opt-tiny" in text


def test_a_reward_model_scores_the_same(run: RunFolder, tmp_path: Path) -> None:
    export(str(run.path), tmp_path / "judge", "reward_model")
    model = load_reward_model(str(run.reward_model))
    with torch.no_grad():
        expected = model(torch.tensor([IDS])).logits[0, 0].item() + 0.5
    assert loaded("reward", tmp_path / "judge") == pytest.approx(expected, abs=1e-5)
    front, text = card(tmp_path / "judge")
    assert front["pipeline_tag"] == "text-classification"
    assert "| reward model | 0.250 [0.125, 0.500] |" in text and "3 held-out pairs of 2 prompts" in text
    assert "No licence was given" in text and "license" not in front


def test_adapters_are_merged_unless_they_are_asked_for(lora: RunFolder, tmp_path: Path) -> None:
    export(str(lora.path), tmp_path / "merged")
    export(str(lora.path), tmp_path / "adapters", adapters=True)
    expected = logprobs(lora.policy)
    assert loaded("policy", tmp_path / "merged") == pytest.approx(expected, abs=1e-6)
    assert loaded("adapters", tmp_path / "adapters", lora.sft) == pytest.approx(expected, abs=1e-5)
    assert not (tmp_path / "merged" / "adapters").exists()
    assert not (tmp_path / "adapters" / "model.safetensors").exists()
    assert json.loads((tmp_path / "adapters/adapter_config.json").read_text())["base_model_name_or_path"] == "sft"
    front, text = card(tmp_path / "adapters")
    assert front["library_name"] == "peft" and "`sft` is the model on which the stage began" in text
    assert "LoRA of rank 2" in text


def test_what_cannot_be_exported_is_one_line_and_leaves_nothing(run: RunFolder, tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").touch()
    for arguments, words in (
        ([str(full)], "is there already and not empty"),
        ([str(full / "mine.txt")], "is there already and not empty"),
        ([str(tmp_path / "a"), "--model", "dpo"], "has no model 'dpo'; it has: base, sft, policy, reward_model"),
        ([str(tmp_path / "a"), "--model", "base"], "is there already"),
        ([str(tmp_path / "a"), "--adapters"], "policy has no adapters, since model.lora is not set"),
        ([str(tmp_path / "a"), "--private"], "--private is about the repository that --push makes"),
        ([str(tmp_path / "a"), "--push", "a b"], "--push 'a b'"),
    ):
        result = CliRunner().invoke(app, ["export", str(run.path), *arguments])
        assert result.exit_code == 2 and words in result.stderr and result.stderr.count("\n") == 1, result.stderr
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["full", "mine.txt"]
    (full / "mine.txt").unlink()
    export(str(run.path), full)  # an empty one will do
    assert (full / "README.md").is_file()


def test_paths_of_this_machine_stay_out_of_cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "one").mkdir(parents=True)
    for place, name in (
        ("/home/me/posts.jsonl", "posts.jsonl"), ("s3://bucket/a/b?region=eu", "b"), ("org/model", "org/model"),
        ("runs/one", "one"), ("embedded:tldr", "embedded:tldr"), ("data/posts.csv", "posts.csv"),
    ):  # fmt: skip
        assert place_of(place) == (name, place == "org/model")
    assert place_of("org/model", here=True) == ("model", False)


def test_a_push_is_one_commit_of_all_files(run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By huggingface_hub as it is, against a hub on loopback."""
    with hub() as there:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", there.url)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "none"))
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
        with pytest.raises(UserError, match="--push needs a token of the hub"):
            export(str(run.path), tmp_path / "a", push="me/mine")
        assert not (tmp_path / "a").exists()
        monkeypatch.setenv("HF_TOKEN", "hf_of_the_test")
        export(str(run.path), tmp_path / "b", push="me/mine", private=True)
        assert there.repositories["me/mine"]["visibility"] == "private"
        assert there.files["me/mine"] == {file.name: file.read_bytes() for file in (tmp_path / "b").iterdir()}
        assert there.tokens == {"Bearer hf_of_the_test"}
        assert card(tmp_path / "b")[1].startswith("\n# me/mine")
        there.refuses = 403
        with pytest.raises(UserError, match=r"is written, but me/mine could not be uploaded: .*hf upload me/mine"):
            export(str(run.path), tmp_path / "c", push="me/mine")
        assert (tmp_path / "c" / "README.md").is_file()
