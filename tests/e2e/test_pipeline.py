"""`rayrlhf run` on the shrunken quick start: what a finished run is."""

from __future__ import annotations

import itertools
import json
import math
import re
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rayrlhf.config_file import load_config
from rayrlhf.data.prompts import prompts_of_step
from rayrlhf.data.run_data import RunData
from rayrlhf.data.tokens import encode_prompts, encode_responses
from rayrlhf.models.loading import load_tokenizer
from rayrlhf.runs.folder import RunFolder
from rayrlhf.runs.ledger import read_ledger

MEASURES = {
    "reward", "gold", "rouge1", "rouge2", "rougeL", "content_words_in_post", "length", "eos_rate",
    "win_rate_vs_reference",
}  # fmt: skip
DIVERSITY = {"distinct_2", "repetition", "common_opening"}
WIN_RATES = {"win_rate_vs_sft", "lc_win_rate_vs_sft", "gold_win_rate_vs_sft", "gold_lc_win_rate_vs_sft"}


@pytest.fixture(scope="module")
def evaluation(finished: Any) -> dict[str, Any]:
    return json.loads((finished.path / "evaluation.json").read_text())


@pytest.fixture(scope="module")
def metrics(finished: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (finished.path / "metrics.jsonl").read_text().splitlines()]


def test_the_run_folder_holds_what_the_design_says(finished: Any) -> None:
    names = {path.name for path in finished.path.iterdir() if not path.name.startswith(".")}
    documented = {"config.yaml", "metrics.jsonl", "report.html", "sft", "reward_model", "policy", "comparisons.parquet"}
    documented |= {"samples.parquet", "evaluation.json", "reward_model.json", "heldout_pairs.parquet", "outputs.json"}
    assert names == documented | {
        "checkpoints",
        "tensorboard",
        "tracking.json",
        "samples",
        "tokens.jsonl",
        "trained.jsonl",
    }
    assert [p.name for p in finished.path.iterdir() if p.name.startswith(".")] == [".lock"]  # no temporaries
    stored = yaml.safe_load((finished.path / "config.yaml").read_text())
    assert (
        stored["rl"]["steps"] == 3 and stored["model"]["path"] == "embedded:opt-tiny"
    )  # an override and a key of the file
    assert "<html" in (finished.path / "report.html").read_text().lower()


def test_what_the_terminal_shows(finished: Any) -> None:
    lines = finished.outcome.out.splitlines()
    for stage, total, shown in (
        ("sft", 3, ("loss", "s", "tok/s")),
        ("reward_model", 2, ("loss", "accuracy", "margin")),
        ("rl", 3, ("score", "reward", "KL", "nats", "length", "EOS", "log-prob gap", "(generate", "learn", "tok/s")),
    ):
        for step in range(1, total + 1):
            own = [line for line in lines if line.startswith(f"{stage} {step}/{total} ")]
            assert any(all(word in line for word in shown) for line in own), (stage, step, own)
        assert all("ETA" in line for line in own)
        assert re.search(rf"^{stage}: done in .*, see {finished.path}/", finished.outcome.out, re.MULTILINE)
    assert lines[-1] == f"finished: {finished.path}"
    assert "Traceback" not in finished.outcome.out + finished.outcome.err
    assert finished.outcome.err == ""


def test_metrics_are_complete_and_say_that_ppo_starts_on_policy(metrics: list[dict[str, Any]]) -> None:
    assert {line["stage"] for line in metrics} == {"sft", "reward_model", "rl", "rl_eval", "run"}
    assert all(line["time"] > 1.7e9 and not line.get("non_finite") for line in metrics)
    assert all(a["time"] <= b["time"] for a, b in itertools.pairwise(metrics))
    rl = [line for line in metrics if line["stage"] == "rl"]
    assert [line["step"] for line in rl] == [1, 2, 3]
    assert [(line["step"], set(line)) for line in metrics if line["stage"] == "rl_eval"] == [
        (step, {"stage", "step", "time", "answers"}) for step in (0, 3)
    ]
    versions = [line["rl/weight_version"] for line in rl]
    assert all(a < b for a, b in itertools.pairwise(versions))
    assert abs(rl[0]["rl/kl"]) < 1e-3
    assert all(line["rl/first_ratio_off_one"] < 1e-4 for line in rl)
    # After updates that the last line sees, stale weights would show here.
    assert all(line["rl/logprob_gap/mean"] < 1e-3 for line in rl)
    assert rl[-1]["rl/kl_k3"] > 1e-3
    assert all(0 < line["rl/length/mean"] <= 40 and 0 <= line["rl/eos_rate"] <= 1 for line in rl)
    assert all(0 < line["rl/gold/mean"] < 1 and line["rl/gold/std"] > 0 for line in rl), "the labeller watches"
    for line in rl:
        penalty = line["rl/kl_coefficient"] * line["rl/kl"]
        assert line["rl/reward/mean"] == pytest.approx(line["rl/score/mean"] - penalty, abs=1e-6)
    assert all(line["rollout/replacements"] == 0 for line in rl)


def test_evaluation_has_exactly_the_documented_keys(evaluation: dict[str, Any]) -> None:
    assert set(evaluation) == {"sft", "policy", "title", "reference", "differences", "metadata"}
    assert set(evaluation["sft"]) == set(evaluation["title"]) == set(evaluation["reference"]) == MEASURES | DIVERSITY
    assert set(evaluation["policy"]) == MEASURES | DIVERSITY | WIN_RATES | {"kl"}
    differences = evaluation["differences"]
    assert set(differences) == {"policy_minus_sft", "policy_minus_sft_at_equal_length"}
    assert set(differences["policy_minus_sft"]) == MEASURES - {"win_rate_vs_reference"}
    assert all(0 < change["p"] <= 1 for change in differences["policy_minus_sft"].values())
    assert set(differences["policy_minus_sft_at_equal_length"]) == {"reward", "gold"}
    for source in ("sft", "policy"):
        for name, interval in evaluation[source].items():
            if name == "win_rate_vs_reference":
                assert interval is None  # the labeller is the reference itself
                continue
            assert set(interval) == {"mean", "low", "high", "n"}
            assert interval["n"] == 16
            assert interval["low"] <= interval["mean"] <= interval["high"]
            assert all(math.isfinite(value) for value in interval.values())
    assert evaluation["metadata"]["prompts"] == 16
    assert evaluation["metadata"]["temperature"] == 0.01
    assert evaluation["metadata"]["gold"] == "rouge_l"


def test_every_prompt_of_every_step_was_learnt_from_once(finished: Any) -> None:
    """The ledger, against the prompts that seed and step decide."""
    config = load_config(finished.path / "config.yaml")
    data = RunData(config, load_tokenizer(str(finished.path / "policy")))
    data.read()
    ids, rl = [record.id for record in data.train.rl], config.rl
    ledger = read_ledger(RunFolder(finished.path))
    assert [line["step"] for line in ledger] == [1, 2, 3]
    versions = [line["version"] for line in ledger]
    assert versions == list(range(versions[0], versions[0] + 3))  # those before were of the stages before
    for line in ledger:
        places = prompts_of_step(len(ids), config.seed, line["step"] - 1, rl.prompts_per_step, rl.skip_prompts)
        assert [group["prompt"] for group in line["groups"]] == [ids[place] for place in places]
        assert {(g["samples"], g["oldest"], g["newest"]) for g in line["groups"]} == {
            (2, line["version"], line["version"])
        }
    learnt = [group["prompt"] for line in ledger for group in line["groups"]]
    assert len(set(learnt)) == len(learnt) == 24


def test_dev_prompts_are_answered_before_and_after_rl(finished: Any) -> None:
    """By the model that it starts from, and by the one that it leaves."""
    files = sorted((finished.path / "samples").iterdir())
    assert [file.name for file in files] == ["step_000000.jsonl", "step_000003.jsonl"]
    first, last = ([json.loads(line) for line in file.read_text().splitlines()] for file in files)
    assert [row["id"] for row in first] == [row["id"] for row in last] and len(first) == 4
    assert {row["weight_version"] for row in first}.isdisjoint({row["weight_version"] for row in last})
    assert all(math.isfinite(row["score"]) and 0 <= row["gold"] <= 1 for row in first + last)
    assert finished.outcome.out.count("answers to dev prompts:") == 2
    assert "step 3, the policy" in (finished.path / "report.html").read_text()


def test_samples_agree_with_the_evaluation(finished: Any, evaluation: dict[str, Any]) -> None:
    table = pq.read_table(finished.path / "samples.parquet")
    texts = ["id", "post", "reference", "sft", "policy"]
    measured = MEASURES - {"win_rate_vs_reference"}
    others = ["reward_reference", "length_reference", "content_words_in_post_reference", "kl_policy"]
    numbers = [f"{measure}_{source}" for measure in measured for source in ("sft", "policy")]
    assert sorted(table.column_names) == sorted(texts + numbers + others)
    assert table.num_rows == len(set(table["id"].to_pylist())) == 16
    for source in ("sft", "policy"):
        for measure in measured:
            mean = np.mean(table[f"{measure}_{source}"].to_numpy())
            assert evaluation[source][measure]["mean"] == pytest.approx(mean, abs=1e-6)
    wins = table["reward_policy"].to_numpy() - table["reward_sft"].to_numpy()
    assert evaluation["policy"]["win_rate_vs_sft"]["mean"] == pytest.approx(np.mean((np.sign(wins) + 1) / 2))


def test_models_load_with_plain_transformers(finished: Any) -> None:
    """And they differ: PPO moved the policy, a little."""
    models = {name: AutoModelForCausalLM.from_pretrained(finished.path / name) for name in ("sft", "policy")}
    tokenizer = AutoTokenizer.from_pretrained(finished.path / "policy")
    ids = tokenizer("SUBREDDIT: r/tifu\n\nTITLE: a cat\n\nPOST: My cat slept.\n\nTL;DR:", return_tensors="pt").input_ids
    with torch.no_grad():
        logprobs = {name: model(ids).logits.log_softmax(-1) for name, model in models.items()}
    difference = (logprobs["sft"] - logprobs["policy"]).abs()
    assert 1e-4 < float(difference.max()) < 3.0
    answer = models["policy"].generate(ids, max_new_tokens=5, do_sample=False)
    assert answer.shape[1] > ids.shape[1]


def test_our_scores_are_those_of_a_plain_loader_plus_the_stored_bias(finished: Any) -> None:
    path = finished.path / "reward_model"
    model = AutoModelForSequenceClassification.from_pretrained(path)
    bias = json.loads((path / "config.json").read_text())["reward_bias"]
    assert bias != 0.0
    config, tokenizer = load_config(finished.path / "config.yaml"), load_tokenizer(str(path))
    table = pq.read_table(finished.path / "samples.parquet").slice(0, 5)
    posts, references = table["post"].to_pylist(), table["reference"].to_pylist()
    responses = encode_responses(tokenizer, references, config.data.max_response_tokens, posts)
    for prompt, response, ours in zip(
        encode_prompts(tokenizer, posts), responses, table["reward_reference"].to_pylist(), strict=True
    ):
        with torch.no_grad():
            plain = float(model(torch.tensor([[*prompt, *response]])).logits[0, 0])
        assert ours == pytest.approx(plain + bias, abs=1e-5)


def test_a_finished_run_says_so_within_seconds(finished: Any, start: Any) -> None:
    before = (finished.path / "metrics.jsonl").read_bytes()
    again = start("rayrlhf", "run", *finished.arguments)
    outcome = again.wait()
    assert outcome.code == 0
    assert "is finished" in outcome.out and str(finished.path / "evaluation.json") in outcome.out
    assert not any(again.ray_directory.iterdir()), "no cluster is needed to say this"
    assert (finished.path / "metrics.jsonl").read_bytes() == before
    stage = start("python", "-m", "jobs.sft", "--config", *finished.arguments).wait()
    assert stage.code == 0 and "sft: already done" in stage.out
