"""Dev prompts answered during RL: what is shown, what is measured, which policy is kept, also after a restart."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from actors.training.dev_answers import DevAnswers, DevPrompt, measured
from actors.training.loop import Loop, LoopArguments
from rayrlhf.config_file import parse_config
from rayrlhf.data.prompts import EncodedPrompt
from rayrlhf.data.records import Prompt
from rayrlhf.errors import UserError
from rayrlhf.models.loading import load_policy, load_tokenizer, resolve_model
from rayrlhf.models.saving import save_model
from rayrlhf.reports.page import write_report
from rayrlhf.reports.progress import answers_text
from rayrlhf.rewards.diversity import wording
from rayrlhf.runs.folder import open_or_create
from rayrlhf.runs.metrics import read_metrics
from rayrlhf.trajectory import FinishReason, GenerationRequest, Sampling, Trajectory

TINY = resolve_model("embedded:opt-tiny")
TOKENIZER = load_tokenizer(TINY)
PROMPTS = [DevPrompt(EncodedPrompt(f"p{i}", (5, 6 + i)), Prompt(f"p{i}", f"TITLE: post {i}", "ref")) for i in range(3)]


def answered(
    prompt_id: str, score: float, gold: float | None, text: str = "a cat sat", finish: FinishReason = "eos"
) -> Trajectory:
    ids = [*TOKENIZER(text, add_special_tokens=False)["input_ids"], TOKENIZER.eos_token_id]
    n = len(ids)
    return Trajectory(
        prompt_id, 0, 0, np.array([5]), np.array(ids), np.full(n, -1.0, np.float32), np.ones(n, np.int64), finish,
        {"reward_model": score}, ref_logprobs=np.full(n, -1.5, np.float32), gold=gold, wording=wording(text),
    )  # fmt: skip


class Policy:
    """A policy whose first weight is its step, and generators that answer with the gold of that step."""

    def __init__(self, run_dir: Path, gold: dict[int, float], rewards: Any = None, **rl: Any) -> None:
        settings = {"name": run_dir.name, "runs_dir": str(run_dir.parent), "rl": rl}
        self.config = parse_config(settings | ({"rewards": rewards} if rewards else {}), "test")
        self.run_dir, self.gold = run_dir, gold
        self.model = load_policy(TINY)
        self.asked: list[tuple[list[GenerationRequest], Sampling, int]] = []

    def answer(self, requests: Sequence[GenerationRequest], sampling: Sampling, version: int) -> list[Trajectory]:
        self.asked.append((list(requests), sampling, version))
        return [answered(request.prompt_id, 0.5, self.gold.get(version)) for request in requests]

    def train(
        self, steps: range, found: tuple[Path, dict[str, Any]] | None = None, save_at: int | None = None
    ) -> tuple[Path, dict[str, Any]] | None:
        """Look at each of the steps, the last of which is the end unless it is to be saved; returns the checkpoint."""
        checkpoint = None
        with Loop("rl", LoopArguments(self.config, str(self.run_dir), "rl-x", 1)) as loop:
            loop.step = steps[0]
            dev = DevAnswers(
                loop, PROMPTS, TOKENIZER, partial(save_model, self.model, TOKENIZER), self.answer, "rl-x", found
            )
            for step in steps:
                loop.step = step
                with torch.no_grad():
                    next(self.model.parameters()).view(-1)[0] = step
                dev.look(version=step, last=save_at is None and step == steps[-1])
                if step == save_at:
                    directory = self.run_dir / "saved"
                    directory.mkdir()
                    dev.save_best(directory)
                    checkpoint = directory, dev.state_dict()
                if dev.enough:
                    break
            if save_at is None:
                loop.finish(dev.publish)
        return checkpoint

    def published(self) -> float:
        """The step of the policy that the run has."""
        name = next(name for name, _ in self.model.named_parameters())
        return float(load_file(self.run_dir / "policy" / "model.safetensors")[name].view(-1)[0])

    def notes(self) -> list[str]:
        lines = (json.loads(line) for line in (self.run_dir / "metrics.jsonl").read_text().splitlines())
        return [line["note"] for line in lines if "note" in line]


EVALUATED = {"sample_every": None, "eval_every": 2, "select": "gold"}


def test_the_best_policy_is_published(tmp_path: Path) -> None:
    policy = Policy(tmp_path / "run", {0: 0.2, 2: 0.4, 4: 0.3, 5: 0.4}, **EVALUATED)
    policy.train(range(6))
    assert policy.published() == 2, "the first of two that are equal"
    assert policy.notes() == ["policy/ is that of step 2 of 5: its gold on 3 dev prompts was best, 0.4000"]
    lines = read_metrics(policy.run_dir, "rl_eval")
    assert [line["step"] for line in lines] == [0, 2, 4, 5]
    assert [line["rl_eval/gold"] for line in lines] == pytest.approx([0.2, 0.4, 0.3, 0.4])
    assert [line["rl_eval/best"] for line in lines] == pytest.approx([0.2, 0.4, 0.4, 0.4])
    assert [line["rl_eval/best_step"] for line in lines] == [0, 2, 2, 2]


def test_without_select_the_last_one_is(tmp_path: Path) -> None:
    policy = Policy(tmp_path / "run", {}, sample_every=None, eval_every=2)
    policy.train(range(4))
    assert policy.published() == 3 and policy.notes() == []


def test_a_run_that_was_killed_decides_as_its_checkpoint_knew(tmp_path: Path) -> None:
    """Killed after step 4, whose policy was better still, it goes on from the checkpoint of step 3. There step 4 turns
    out worse, as it may where generation runs ahead: what was kept of it is not published."""
    policy = Policy(tmp_path / "run", {0: 0.2, 2: 0.4, 4: 0.9}, **EVALUATED)
    found = policy.train(range(5), save_at=3)
    assert found is not None
    again = Policy(tmp_path / "run", {4: 0.3, 5: 0.35}, **EVALUATED)
    again.train(range(3, 6), found=found)
    assert again.published() == 2


def test_patience_ends_the_stage(tmp_path: Path) -> None:
    policy = Policy(tmp_path / "run", {0: 0.5, 2: 0.4, 4: 0.3, 6: 0.9}, **EVALUATED, patience=2)
    policy.train(range(9))
    assert [line["step"] for line in read_metrics(policy.run_dir, "rl_eval")] == [0, 2, 4]
    assert policy.notes()[0] == "stopped after 4 steps: 2 evaluations without a better gold"
    assert policy.published() == 0


def test_patience_goes_on_counting_after_a_restart(tmp_path: Path) -> None:
    gold = {0: 0.5, 2: 0.4, 4: 0.3, 6: 0.9}
    found = Policy(tmp_path / "run", gold, **EVALUATED, patience=2).train(range(4), save_at=3)
    again = Policy(tmp_path / "run", gold, **EVALUATED, patience=2)
    again.train(range(3, 9), found=found)
    assert again.notes()[0].startswith("stopped after 4 steps") and again.published() == 0


def test_a_measure_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"rl.select: this run has no gold"):
        Policy(tmp_path / "run", {}, **EVALUATED).train(range(1))


def test_any_reward_and_any_rouge_measure_may_choose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`brevity` is best at step 2, ROUGE-2 at step 4, and the sum of the rewards at step 0."""
    said = {0: "the cat sat", 2: "a dog", 4: "a black dog ran", 5: "a dog ran black"}
    rewards = {0: (9.0, 0.1), 2: (1.0, 0.9), 4: (2.0, 0.3), 5: (3.0, 0.4)}

    def answer(self: Policy, requests: Sequence[GenerationRequest], sampling: Sampling, version: int) -> Any:
        answers = [answered(request.prompt_id, 0.0, None, said[version]) for request in requests]
        for each in answers:
            each.rewards = dict(zip(("reward_model", "brevity"), rewards[version], strict=True))
        return answers

    monkeypatch.setattr(Policy, "answer", answer)
    asked = [DevPrompt(each.encoded, replace(each.prompt, reference="a black dog slept")) for each in PROMPTS[:2]]
    asked.append(DevPrompt(PROMPTS[2].encoded, replace(PROMPTS[2].prompt, reference=None)))  # which ROUGE leaves out
    monkeypatch.setattr("tests.unit.test_dev_answers.PROMPTS", asked)
    given = [{"kind": "model"}, {"kind": "python", "name": "brevity", "path": "brief.py:brief"}]
    for select, best in (("score", 0), ("brevity", 2), ("rouge2", 4)):
        policy = Policy(tmp_path / select, {}, rewards=given, sample_every=None, eval_every=2, select=select)
        policy.train(range(6))
        assert policy.published() == best
        lines = read_metrics(policy.run_dir, "rl_eval")
        assert [line["rl_eval/rewards/brevity"] for line in lines] == pytest.approx([0.1, 0.9, 0.3, 0.4])
    # Two of three 2-grams of "a black dog ran", which are two of three of the reference.
    assert [line["rl_eval/rouge2"] for line in lines] == pytest.approx([0, 0, 2 / 3, 0])


def test_answers_to_look_at(tmp_path: Path) -> None:
    """Before the first step, every two steps and at the end; the same prompts with the same seeds, near-greedily."""
    run = open_or_create(parse_config({"name": "run"}, "test"), tmp_path)
    policy = Policy(run.path, {0: 0.25, 2: 0.5, 3: 0.75}, sample_every=2, sample_prompts=2)
    stale = run.dev_samples / "step_000008.jsonl"  # of an earlier attempt
    run.dev_samples.mkdir()
    stale.write_text("{}")
    policy.train(range(4))
    assert [version for _, _, version in policy.asked] == [0, 2, 3]
    assert len({tuple((r.prompt_id, r.seed) for r in requests) for requests, _, _ in policy.asked}) == 1
    assert {sampling.temperature for _, sampling, _ in policy.asked} == {0.01}
    files = sorted(run.dev_samples.iterdir())
    assert [file.stem for file in files] == ["step_000000", "step_000002", "step_000003"]
    first, second = (json.loads(line) for line in files[1].read_text().splitlines())
    assert first == {
        "step": 2, "weight_version": 2, "id": "p0", "prompt": "TITLE: post 0", "reference": "ref",
        "answer": "a cat sat", "score": 0.5, "gold": 0.5, "tokens": first["tokens"], "ended": True,
    }  # fmt: skip
    assert second["id"] == "p1"
    shown = read_metrics(run.path, "rl_eval")[1]["answers"]
    assert shown.splitlines()[:2] == ["post 0", "  → a cat sat (score 0.500, gold 0.500)"]
    assert read_metrics(run.path, "rl") == [], "the steps' own lines stay as they were"
    page = write_report(run).read_text(encoding="utf-8")
    assert page.count("a cat sat") == 6 and "step 3, the policy" in page and '"gold":0.25' in page


def test_long_answers_are_shown_short() -> None:
    row = {"prompt": "x" * 300, "answer": "a\nb " * 200, "score": 1.0, "gold": None, "weight_version": 3}
    head, answer = answers_text([row]).splitlines()
    assert len(head) == 110 and head.endswith("…")
    assert answer.startswith("  → a b a b") and answer.endswith("… (score 1.000)") and len(answer) < 230


def test_measures_by_hand() -> None:
    """The KL is of answers of their own, 0.5 nats a token."""
    answers = [answered("a", 0.5, 0.2, "a b c d"), answered("b", 0.25, 0.4, "a b c d", "length")]
    drawn = [answered("a", 0.0, None, "the"), answered("b", 0.0, None, "the")]
    found = measured(answers, drawn, missing_eos_reward=-1.0)
    assert found == {
        "rl_eval/prompts": 2.0,
        "rl_eval/score": pytest.approx(-0.25),  # (0.5 - 1) / 2
        "rl_eval/rewards/reward_model": pytest.approx(0.375),  # as it is, also of the answer that does not end
        "rl_eval/gold": pytest.approx(0.3),
        "rl_eval/kl": pytest.approx(0.5 * drawn[0].written_tokens),
        "rl_eval/length": float(answers[0].written_tokens),
        "rl_eval/eos_rate": 0.5,
        "rl_eval/repetition": 0.0,
        "rl_eval/distinct_2": 0.5,
        "rl_eval/common_opening": 1.0,
    }
    assert measured(answers, drawn, None)["rl_eval/score"] == pytest.approx(0.375)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rl": {"select": "gold"}}, "select: gold needs eval_every"),
        ({"rl": {"eval_every": 5, "patience": 2}}, "patience needs select"),
        (
            {"environment": {"path": "game.py:Game"}, "rl": {"eval_every": 5, "select": "gold"}},
            "rl.select: gold is not measured with an environment",
        ),
        (
            {"rl": {"eval_every": 5, "select": "helpful"}},
            "rl.select: helpful is not measured; take one of score, gold, rouge1, .*, reward_model",
        ),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse_config({"name": "x", **settings}, "test")


def test_looking_does_not_decide_the_result_but_choosing_does() -> None:
    plain = parse_config({"name": "x", "rl": {"eval_every": 5}}, "test").rl
    chosen = parse_config({"name": "x", "rl": {"eval_every": 5, "select": "gold"}}, "test").rl
    assert {"eval_every", "sample_every", "patience"} <= set(plain.of_no_result)
    assert {"sample_every"} <= set(chosen.of_no_result) and "eval_every" not in chosen.of_no_result
