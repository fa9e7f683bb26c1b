"""`--local`: a stage in one process, so that a debugger works."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jobs.reward_model import reward_model
from jobs.stage import run
from rayrlhf.config_file import load_config
from rayrlhf.data.comparisons import read_ranked
from rayrlhf.reports.raters import agreement_of
from rayrlhf.rewards.labellers import read_unranked
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


PEOPLE = """
import sys
from rayrlhf.labelling.database import LabelDatabase
from rayrlhf.labelling.judgements import Judgement

database = LabelDatabase(sys.argv[1])
for name in ("ann", "bob"):
    database.add_labeller(name)
    for number, item in enumerate(database.items()):
        longest = [-len(answer) for answer in item.answers]
        places = sorted(set(longest))
        ranks = None if number == 0 else tuple(1 if name == "bob" else places.index(each) + 1 for each in longest)
        database.judge(Judgement(item.id, name, ranks, skipped="" if ranks else "unsure"), f"{name} {item.id}")
"""
"""Another process, in which ann prefers longer answers, bob calls all of them equal, and both skip the first prompt."""


def test_people_rank_while_the_run_waits_and_it_goes_on_by_itself(finished: Any, tmp_path: Path, start: Any) -> None:
    path = tmp_path / "people"
    shutil.copytree(finished.path / "sft", path / "sft")
    changes = [f"runs_dir={tmp_path}", "name=people", "stages=[sft, collect, reward_model]", "collect.prompts=16"]
    changes += [
        "collect.labeller.kind=people",
        "collect.labeller.labellers=2",
        "collect.labeller.aggregate=bradley_terry",
    ]
    command = start("rayrlhf", "run", *finished.arguments, *changes, "--local")
    command.wait_for_line(r"collect: 0 of \d+ prompts are ranked; `rayrlhf label ")
    waiting = read_unranked(path / "to_rank.jsonl")
    assert not (path / "comparisons.parquet").exists()
    subprocess.run([sys.executable, "-c", PEOPLE, str(path / "labels.sqlite")], cwd=ROOT, check=True)
    outcome = command.wait()
    assert outcome.code == 0, outcome.err
    assert f"1 of {len(waiting)} prompts have no ranking and are left out" in " ".join(outcome.out.split())
    ranked = read_ranked(path / "comparisons.parquet")
    assert [r.id for r in ranked] == [item.id for item in waiting[1:]]
    for record in ranked:
        lengths = [len(text) for text in record.responses]
        assert lengths == sorted(lengths, reverse=True), "bob's ties leave ann's order"
        longer = {(i, j) for i in range(len(lengths)) for j in range(len(lengths)) if lengths[i] > lengths[j]}
        assert set(record.pairs) == longer, "answers of one length are a tie"
    assert json.loads((path / "labeller.json").read_text())["skipped"] == 2
    lines = read_metrics(path, "reward_model")
    assert lines[0]["reward_model/pairs"] == sum(len(r.pairs) for r in ranked if not r.heldout)
    assert (path / "reward_model" / "model.safetensors").is_file()
    found = {(each.one, each.other): each for each in agreement_of([path])}
    both = found["people", "longer answer"]
    assert both.alike is not None and both.alike.mean == 1.0 and both.pairs == sum(len(r.pairs) for r in ranked)
    assert found["people: ann", "people: bob"].alike is None, "bob prefers nothing"
    assert ("people", "reward model") in found
