"""The loop of `dpo` on the embedded model, in this process."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from actors.pools.remote import Remote
from actors.training.dpo import DPOArguments, dpo_loop
from actors.training.loop import Loop
from jobs.dpo import dpo
from jobs.session import opened
from rayrlhf.config import Config
from rayrlhf.config_file import parse_config
from rayrlhf.data.comparisons import RankedAnswers
from rayrlhf.errors import UserError
from rayrlhf.models.loading import load_tokenizer, resolve_model
from rayrlhf.runs.metrics import read_metrics
from tests.ray.sft_runs import StopsAfter

TINY = resolve_model("embedded:opt-tiny")
EOS = 2


def make_config(tmp_path: Path, lora: dict[str, Any] | None = None, **settings: Any) -> Config:
    section = {"prompts_per_batch": 8, "optimizer": {"lr": 3e-4, "warmup_fraction": 0.1}} | settings
    return parse_config(
        {"name": "run", "runs_dir": str(tmp_path), "seed": 5, "model": {"lora": lora}, "dpo": section}, "test"
    )


def toy(count: int, seed: int, heldout: bool = False) -> list[RankedAnswers]:
    """Two or three answers; the more often token 500 stands in one in place of token 600, the better it is."""
    generator = np.random.default_rng(seed)
    made = []
    for i in range(count):
        answers = int(generator.integers(2, 4))
        responses = []
        for rank in range(answers):
            good = 3 * (answers - 1 - rank)
            tokens = [500] * good + [600] * (6 - good) + generator.integers(700, 8000, 4).tolist()
            responses.append((*(int(t) for t in generator.permutation(tokens)), EOS))
        prompt = (EOS, *(int(t) for t in generator.integers(700, 8000, generator.integers(3, 20))))
        names = tuple(map(str, range(answers)))
        made.append(RankedAnswers(f"{seed}-{i}", "", prompt, names, tuple(responses), None, "toy", heldout))
    return made


def run_dpo(
    config: Config, comparisons: list[RankedAnswers], stop: Remote | None = None
) -> tuple[Path, list[dict[str, Any]]]:
    run_dir = Path(config.runs_dir) / config.name
    dpo_loop(DPOArguments(config, str(run_dir), "dpo", 2, TINY, comparisons, stop=stop))
    return run_dir, read_metrics(run_dir, "dpo")


def weights(directory: Path) -> torch.Tensor:
    tensors = load_file(directory / "model.safetensors")
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


AT_START = {"dpo": math.log(2), "ipo": 25.0, "kto": 0.5}
"""The loss where the policy is the reference: all scores and KTO's KL are 0."""


@pytest.mark.parametrize("loss", ["dpo", "ipo", "simpo", "kto"])
def test_learns_to_prefer_the_better_answers(tmp_path: Path, loss: str) -> None:
    run_dir, metrics = run_dpo(make_config(tmp_path, loss=loss), toy(48, seed=0) + toy(16, seed=1, heldout=True))
    assert [m["step"] for m in metrics] == list(range(7))
    assert metrics[0]["dpo/prompts"] == 48 and metrics[0]["dpo/heldout_prompts"] == 16
    if loss in AT_START:
        for measured in (metrics[0]["dpo/heldout_loss"], metrics[1]["dpo/loss"]):
            assert measured == pytest.approx(AT_START[loss], rel=1e-4)
        assert metrics[1]["dpo/reward/chosen"] == pytest.approx(0.0, abs=1e-4)
    assert metrics[-1]["dpo/heldout_loss"] < metrics[0]["dpo/heldout_loss"]
    assert metrics[-1]["dpo/heldout_accuracy"] > 0.8
    assert metrics[-1]["dpo/margin"] == pytest.approx(
        metrics[-1]["dpo/reward/chosen"] - metrics[-1]["dpo/reward/rejected"], rel=1e-5
    )
    assert ("dpo/kl" in metrics[-1]) is (loss == "kto")
    # The saved policy through transformers alone: it gives token 500 more weight than the model before did.
    before, after = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (TINY, run_dir / "dpo"))
    ids = torch.tensor([toy(1, seed=1)[0].prompt_ids])
    with torch.no_grad():
        good, bad = (after(ids).logits - before(ids).logits)[0, -1, [500, 600]].tolist()
    assert good > bad


def test_kto_learns_from_labelled_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole stage, from a file of single answers; token 500 stands in good answers, token 600 in bad ones."""
    tokenizer = load_tokenizer(TINY)
    for split, ranked in (("train", toy(40, seed=0)), ("validation", toy(12, seed=1))):
        rows = [
            {"prompt": tokenizer.decode(c.prompt_ids[1:]), "completion": tokenizer.decode(ids[:-1]), "label": good}
            for c in ranked
            for ids, good in ((c.response_ids[0], True), (c.response_ids[-1], False))
        ]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = make_config(tmp_path / "runs", loss="kto", epochs=2).model_dump(exclude={"environment"})
    data = {key: {"format": "unpaired", "path": str(tmp_path)} for key in ("demonstrations", "comparisons")}
    config = parse_config({**settings, "stages": ["sft", "dpo"], "data": data, "name": "run"}, "test")
    with opened(config, local=True) as session:
        with session.run.writing("sft") as directory:
            shutil.copytree(TINY, directory, dirs_exist_ok=True)
        dpo(session)
        before, after = (load_file(session.run.path / name / "model.safetensors") for name in ("sft", "dpo"))
        first, *steps = read_metrics(session.run.path, "dpo")
    assert "40 train prompts with 40 good and 40 bad answers" in capsys.readouterr().out
    assert first["dpo/prompts"] == first["dpo/good_answers"] == first["dpo/bad_answers"] == 40
    assert first["dpo/heldout_good_answers"] == 12
    assert first["dpo/heldout_loss"] == pytest.approx(0.5, abs=1e-4)
    assert len(steps) == 10 and steps[-1]["dpo/heldout_loss"] < first["dpo/heldout_loss"]
    assert steps[-1]["dpo/heldout_accuracy"] > 0.8
    assert steps[-1]["dpo/heldout_margin"] == pytest.approx(
        steps[-1]["dpo/heldout_reward/chosen"] - steps[-1]["dpo/heldout_reward/rejected"]
    )
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_the_reference_may_be_another_model(tmp_path: Path) -> None:
    """As in later rounds, whose policy goes on while the reference stays: margins against transformers alone."""
    other, policy = (AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval() for _ in range(2))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.05)
    other.save_pretrained(tmp_path / "other")
    load_tokenizer(TINY).save_pretrained(tmp_path / "other")
    heldout = toy(3, seed=1, heldout=True)

    @torch.no_grad()
    def logprob(model: Any, prompt: tuple[int, ...], answer: tuple[int, ...]) -> float:
        logs = model(torch.tensor([[*prompt, *answer]])).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
        return float(logs[range(len(answer)), list(answer)].sum())

    margins = []
    for c in heldout:
        ratios = [logprob(policy, c.prompt_ids, a) - logprob(other, c.prompt_ids, a) for a in c.response_ids]
        margins += [0.1 * (ratios[better] - ratios[worse]) for better, worse in c.pairs]
    config = make_config(tmp_path)
    run_dir = Path(config.runs_dir) / config.name
    comparisons = toy(8, seed=0) + heldout
    dpo_loop(DPOArguments(config, str(run_dir), "dpo", 2, TINY, comparisons, reference=str(tmp_path / "other")))
    first = read_metrics(run_dir, "dpo")[0]
    assert first["dpo/heldout_margin"] == pytest.approx(float(np.mean(margins)), rel=1e-3)
    assert abs(first["dpo/heldout_margin"]) > 1e-3


@pytest.mark.parametrize("settings", [{"loss": "kto"}, {"loss": "dpo", "lora": {"rank": 4}}])
def test_a_killed_run_continues_and_ends_as_if_nothing_had_happened(
    tmp_path: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    comparisons = toy(32, seed=0) + toy(4, seed=1, heldout=True)
    settings = settings | {"prompts_per_batch": 4}
    whole, expected = run_dpo(make_config(tmp_path / "whole", **settings), comparisons)
    config, save = make_config(tmp_path / "broken", **settings), Loop.save

    def save_and_die(self: Loop, *args: Any) -> None:
        save(self, *args)
        if self.step == 2:
            raise ConnectionError("the machine is gone")

    # First it is asked to stop, at a step after which nothing is measured, and then it dies.
    _, metrics = run_dpo(config, comparisons, Remote("stop", StopsAfter(1), local=True))
    assert [m["step"] for m in metrics] == [0, 1] and "dpo/heldout_accuracy" not in metrics[1]
    monkeypatch.setattr(Loop, "save", save_and_die)
    with pytest.raises(ConnectionError):
        run_dpo(config, comparisons)
    assert not (tmp_path / "broken" / "run" / "dpo").exists()
    monkeypatch.setattr(Loop, "save", save)
    again, metrics = run_dpo(config, comparisons)
    assert torch.equal(weights(again / "dpo"), weights(whole / "dpo"))
    for name in ("dpo/loss", "dpo/heldout_accuracy", "dpo/reward/chosen"):
        assert [m.get(name) for m in metrics] == [m.get(name) for m in expected]


def test_weights_do_not_depend_on_the_micro_batch_size(tmp_path: Path) -> None:
    found = [
        weights(run_dpo(make_config(tmp_path / str(tokens), micro_batch_tokens=tokens), toy(16, seed=0))[0] / "dpo")
        for tokens in (40, 100_000)
    ]
    moved = float((found[0] - weights(Path(TINY))).norm())
    assert float((found[0] - found[1]).norm()) < 1e-3 * moved


def test_bad_data_is_one_line(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    with pytest.raises(UserError, match="dpo: no comparison with a preference"):
        run_dpo(config, toy(2, seed=0, heldout=True))
    long = RankedAnswers("x", "", (EOS, *[700] * 1000), ("a", "b"), ((5,) * 30, (6,)), None, "")
    with pytest.raises(UserError, match="dpo: the longest prompt with answer has 1031 tokens"):
        run_dpo(config, [long])
    with pytest.raises(UserError, match="two different prompts"):
        run_dpo(make_config(tmp_path, loss="kto"), toy(1, seed=0))


def test_a_broken_model_is_not_published(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"optimizer": {"lr": 1e39, "schedule": "constant"}}
    with pytest.raises(FloatingPointError, match="dpo: the policy has weights that are not finite"):
        run_dpo(make_config(tmp_path, **settings), toy(8, seed=0))
    assert not (tmp_path / "run" / "dpo").exists()
