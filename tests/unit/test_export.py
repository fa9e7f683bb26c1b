"""`rayrlhf export`: a directory that others load, with a card that says what is true; and its upload."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

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
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
ids = torch.tensor([json.loads(sys.argv[1])])
for kind, directory, base in json.loads(sys.argv[2]):
    AutoTokenizer.from_pretrained(directory)
    if kind == "adapters":
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), directory)
    else:
        auto = AutoModelForSequenceClassification if kind == "reward_model" else AutoModelForCausalLM
        model = auto.from_pretrained(directory)
    with torch.no_grad():
        logits = model(ids).logits[0].float()
    if kind == "reward_model":
        print(json.dumps(logits[0].item() + model.config.reward_bias))
    else:
        print(json.dumps(logits.log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[:, 0].tolist()))
"""
"""As the cards say how to load an export; it knows nothing of this package."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return finished_run(tmp_path_factory.mktemp("full"))


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return finished_run(tmp_path_factory.mktemp("lora"), lora=True)


class Exports(NamedTuple):
    """Four exports, and what transformers computes with each, in another process."""

    directories: dict[str, Path]
    computed: dict[str, Any]


@pytest.fixture(scope="module")
def exports(run: RunFolder, lora: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> Exports:
    target = tmp_path_factory.mktemp("exports")
    export(str(run.path), target / "policy", license="apache-2.0")
    export(str(run.path), target / "reward_model", "reward_model")
    export(str(lora.path), target / "merged")
    export(str(lora.path), target / "adapters", adapters=True)
    names = ("policy", "reward_model", "merged", "adapters")
    given = [[name, str(target / name), str(lora.sft)] for name in names]
    command = [sys.executable, "-I", "-c", LOADED, json.dumps(IDS), json.dumps(given)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=target)
    assert done.returncode == 0, done.stderr
    assert sorted(each.name for each in target.iterdir()) == sorted(names)  # nothing temporary
    return Exports(
        {name: target / name for name in names},
        dict(zip(names, map(json.loads, done.stdout.splitlines()), strict=True)),
    )


def logprobs(model: Path) -> np.ndarray:
    """[4] of the tokens behind the first, by the run's own loader."""
    with torch.no_grad():
        logits = load_policy(str(model))(torch.tensor([IDS])).logits[0]
    return logits.log_softmax(-1)[:-1].gather(1, torch.tensor(IDS[1:])[:, None])[:, 0].numpy()


def card(directory: Path) -> tuple[dict[str, Any], str]:
    """Front matter, and the text behind it."""
    _, front, text = (directory / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), text


def test_a_policy_computes_the_same_in_another_process(run: RunFolder, exports: Exports) -> None:
    assert exports.computed["policy"] == pytest.approx(logprobs(run.policy), abs=1e-6)
    written = {file.name for file in exports.directories["policy"].iterdir()}
    assert written == {*(file.name for file in run.policy.iterdir()), "README.md"}


def test_the_card_says_what_the_run_measured(run: RunFolder, exports: Exports) -> None:
    target = exports.directories["policy"]
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
    assert 'AutoModelForCausalLM.from_pretrained("policy")' in text and "max_new_tokens=8" in text
    assert str(run.path) not in text and "embedded:opt-tiny" in text


def test_a_reward_model_scores_the_same(run: RunFolder, exports: Exports) -> None:
    model = load_reward_model(str(run.reward_model))
    with torch.no_grad():
        expected = model(torch.tensor([IDS])).logits[0, 0].item() + 0.5
    assert exports.computed["reward_model"] == pytest.approx(expected, abs=1e-5)
    front, text = card(exports.directories["reward_model"])
    assert front["pipeline_tag"] == "text-classification"
    assert "| reward model | 0.250 [0.125, 0.500] |" in text and "3 held-out pairs of 2 prompts" in text
    assert "No licence was given" in text and "license" not in front


def test_adapters_are_merged_unless_they_are_asked_for(lora: RunFolder, exports: Exports) -> None:
    expected = logprobs(lora.policy)
    assert exports.computed["merged"] == pytest.approx(expected, abs=1e-6)
    assert exports.computed["adapters"] == pytest.approx(expected, abs=1e-5)
    directory = exports.directories["adapters"]
    assert not (exports.directories["merged"] / "adapters").exists()
    assert not (directory / "model.safetensors").exists()
    assert json.loads((directory / "adapter_config.json").read_text())["base_model_name_or_path"] == "sft"
    front, text = card(directory)
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
        ("org/model-1.7B", "org/model-1.7B"), ("gpt2", "gpt2"), ("runs/one", "one"),
        ("embedded:tldr", "embedded:tldr"), ("data/posts.csv", "posts.csv"),
    ):  # fmt: skip
        assert place_of(place) == (name, place in ("org/model", "org/model-1.7B", "gpt2"))
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
