"""The reward-model loop on the embedded model, in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from actors.training.loop import Loop
from actors.training.reward_model import RewardModelArguments, reward_model_loop
from rayrlhf.algorithms.ranked_pass import score_rows
from rayrlhf.config import Config
from rayrlhf.config_data import DatasetConfig
from rayrlhf.config_file import parse_config
from rayrlhf.data.comparisons import RankedAnswers, from_comparisons
from rayrlhf.data.rows import Row
from rayrlhf.data.sources import DataSet, Rendering
from rayrlhf.errors import UserError
from rayrlhf.models.forward import Forward
from rayrlhf.models.loading import load_reward_model, load_tokenizer, resolve_model
from rayrlhf.models.ranks import Ranks
from rayrlhf.runs.metrics import read_metrics

TINY = resolve_model("embedded:opt-tiny")
PAD, EOS = 1, 2
HH = Path(__file__).parents[1] / "data" / "hh_harmless_small.jsonl.gz"


def make_config(tmp_path: Path, lora: dict[str, Any] | None = None, **settings: Any) -> Config:
    section = {"prompts_per_batch": 8, "optimizer": {"lr": 1e-3, "warmup_fraction": 0.05}} | settings
    return parse_config(
        {"name": "run", "runs_dir": str(tmp_path), "seed": 5, "model": {"lora": lora}, "reward_model": section}, "test"
    )  # fmt: skip


def toy(count: int, seed: int, heldout: bool = False) -> list[RankedAnswers]:
    """Two to four answers; the more often token 500 stands in one in place of token 600, the better it is."""
    generator = np.random.default_rng(seed)
    made = []
    for i in range(count):
        answers = int(generator.integers(2, 5))
        responses = []
        for rank in range(answers):
            good = 2 * (answers - 1 - rank)
            tokens = (
                [500] * good + [600] * (6 - good) + generator.integers(700, 8000, generator.integers(2, 12)).tolist()
            )
            responses.append((*(int(t) for t in generator.permutation(tokens)), EOS))
        prompt = (EOS, *(int(t) for t in generator.integers(700, 8000, generator.integers(3, 30))))
        made.append(
            RankedAnswers(
                f"{seed}-{i}", "", prompt, tuple(map(str, range(answers))), tuple(responses), None, "toy", heldout,
                source=("a", "b")[i % 2],
            )
        )  # fmt: skip
    return made


def references(count: int = 12) -> list[Row]:
    return [Row.completion(c.prompt_ids, c.response_ids[0]) for c in toy(count, seed=99)]


def run_reward_model(config: Config, comparisons: list[RankedAnswers]) -> tuple[Path, list[dict[str, Any]]]:
    run_dir = Path(config.runs_dir) / config.name
    arguments = (config, str(run_dir), "reward_model", 2, TINY, comparisons, references())
    reward_model_loop(RewardModelArguments(*arguments, sft=TINY))
    return run_dir, read_metrics(run_dir, "reward_model")


def weights(directory: Path) -> torch.Tensor:
    tensors = load_file(directory / "model.safetensors")
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def test_learns_a_separable_preference_and_centres_the_references(tmp_path: Path) -> None:
    train, heldout = toy(96, seed=0), toy(40, seed=1, heldout=True)
    run_dir, metrics = run_reward_model(make_config(tmp_path), train + heldout)
    assert [m["step"] for m in metrics] == list(range(13))
    assert metrics[1]["memory/learner_peak_mib"] > 100
    assert metrics[0]["reward_model/prompts"] == 96 and metrics[0]["reward_model/heldout_prompts"] == 40
    assert metrics[0]["reward_model/pairs"] == sum(len(c.response_ids) * (len(c.response_ids) - 1) // 2 for c in train)
    assert metrics[-1]["reward_model/heldout_accuracy"] > 0.9 > metrics[0]["reward_model/heldout_accuracy"]
    assert [m["step"] for m in metrics if "reward_model/heldout_accuracy" in m] == [0, 3, 6, 9, 12]
    assert metrics[-1]["reward_model/heldout_loss"] < metrics[0]["reward_model/heldout_loss"]

    # The saved model through transformers alone, row by row.
    plain = AutoModelForSequenceClassification.from_pretrained(run_dir / "reward_model").eval()
    bias = json.loads((run_dir / "reward_model" / "config.json").read_text())["reward_bias"]
    assert bias == metrics[-1]["reward_model/reward_bias"]

    def score(ids: Any) -> float:
        with torch.no_grad():
            return float(plain(input_ids=torch.tensor([list(ids)])).logits) + bias

    assert np.mean([score(row.ids.tolist()) for row in references()]) == pytest.approx(0.0, abs=1e-4)
    right = []
    for c in heldout:
        scores = [score((*c.prompt_ids, *answer)) for answer in c.response_ids]
        right += [scores[better] > scores[worse] for better, worse in c.pairs]
    assert metrics[-1]["reward_model/heldout_accuracy"] == pytest.approx(np.mean(right))
    result = json.loads((run_dir / "reward_model.json").read_text())
    assert result["accuracy"]["reward_model"]["mean"] == pytest.approx(np.mean(right))
    assert (result["prompts"], result["pairs"]) == (40, len(right))
    assert result["metrics"].items() <= metrics[-1].items(), "the summary is that of the last step"
    check_baselines(result, heldout)
    saved = load_reward_model(str(run_dir / "reward_model"))
    forward = Forward(saved, pad_token_id=PAD, max_tokens=4096, dtype="float32")
    ours = score_rows(forward, references(), Ranks(1))
    assert ours == pytest.approx([score(row.ids.tolist()) for row in references()], abs=1e-4)


def check_baselines(result: dict[str, Any], heldout: list[RankedAnswers]) -> None:
    """Against transformers' own log-probs of the model that training started from, and a count by hand."""
    base = AutoModelForCausalLM.from_pretrained(TINY).eval()
    right: dict[str, list[float]] = {"longer": [], "shorter": [], "sft_logprob_sum": [], "sft_logprob_mean": []}
    for c in heldout:
        sums = []
        for answer in c.response_ids:
            ids = torch.tensor([[*c.prompt_ids, *answer]])
            labels = ids.clone()
            labels[:, : len(c.prompt_ids)] = -100
            with torch.no_grad():
                sums.append(-float(base(input_ids=ids, labels=labels).loss) * len(answer))
        for i, j in c.pairs:
            a, b = len(c.response_ids[i]), len(c.response_ids[j])
            right["longer"].append(0.5 if a == b else float(a > b))
            right["shorter"].append(0.5 if a == b else float(a < b))
            right["sft_logprob_sum"].append(float(sums[i] > sums[j]))
            right["sft_logprob_mean"].append(float(sums[i] / a > sums[j] / b))
    own = result["accuracy"]["reward_model"]["mean"]
    for name, values in right.items():
        accuracy, difference = result["accuracy"][name], result["reward_model_minus"][name]
        assert accuracy["mean"] == pytest.approx(np.mean(values), abs=1e-9), name
        assert accuracy["low"] < accuracy["mean"] < accuracy["high"] and accuracy["n"] == 40
        assert difference["mean"] == pytest.approx(own - np.mean(values), abs=1e-9)
    assert result["reward_model_minus"]["longer"]["low"] > 0.1, "it learnt more than length"


@pytest.mark.parametrize(
    ("lora", "damaged"), [(None, False), ({"rank": 8, "target_modules": ["fc2"]}, False), (None, True)]
)
def test_a_killed_run_continues_and_ends_as_if_nothing_had_happened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: dict[str, Any] | None, damaged: bool
) -> None:
    """With one flipped bit in its newest checkpoint, too: the one before it is taken, and the user is told."""
    comparisons = toy(40, seed=6) + toy(8, seed=7, heldout=True)
    whole, _ = run_reward_model(make_config(tmp_path / "whole", lora), comparisons)
    saved: list[int] = []
    save = Loop.save

    def dying(loop: Loop, state: dict[str, Any]) -> None:
        save(loop, state)
        saved.append(loop.step)
        if len(saved) == 2:
            raise KeyboardInterrupt

    config = make_config(tmp_path / "broken", lora)
    monkeypatch.setattr(Loop, "save", dying)
    with pytest.raises(KeyboardInterrupt):
        run_reward_model(config, comparisons)
    assert not (Path(config.runs_dir) / "run" / "reward_model").exists()
    newest: Path | None = None
    if damaged:
        newest = Path(config.runs_dir) / "run" / "checkpoints" / "reward_model" / "checkpoint_000001" / "state.pt"
        content = bytearray(newest.read_bytes())
        content[len(content) // 2] ^= 1
        newest.write_bytes(content)
    run_dir, metrics = run_reward_model(config, comparisons)
    if damaged:
        assert saved == [2, 3, 3, 4, 5], "from the checkpoint before the damaged one"
        assert newest is not None
        (line,) = [m["note"] for m in metrics if m["step"] == 2 and "note" in m]
        assert line == (
            f"{newest.parent} is damaged (state.pt is not what was written); continuing from "
            f"{newest.parent.with_name('checkpoint_000000')}"
        )
    else:
        assert saved == [2, 3, 4, 5]
    assert [m["step"] for m in metrics] == list(range(6))
    assert torch.equal(weights(run_dir / "reward_model"), weights(whole / "reward_model"))
    assert (run_dir / "reward_model.json").read_text() == (whole / "reward_model.json").read_text()
    if lora:
        now, before = (load_file(Path(path) / "model.safetensors") for path in (run_dir / "reward_model", TINY))
        kept = {name for name in now if name in before and torch.equal(now[name], before[name])}
        assert {name.split(".")[-2] for name in now.keys() - kept} == {"fc2", "score"}


def test_people_s_comparisons_of_harmlessness_train(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(TINY)
    source = DataSet([DatasetConfig(format="hh_rlhf", path=str(HH))], Rendering(tokenizer, 160), "comparison")
    found = source.comparisons("train").records
    comparisons = from_comparisons(found[:24], 48) + from_comparisons(found[24:32], 48, heldout=True)
    _, metrics = run_reward_model(make_config(tmp_path, epochs=3), comparisons)
    last = metrics[-1]
    assert last["reward_model/loss"] < metrics[1]["reward_model/loss"]
    assert (
        sum(v for k, v in last.items() if k.startswith("reward_model/margin_from/"))
        == metrics[0]["reward_model/heldout_pairs"]
    )


def test_without_held_out_pairs_there_is_no_accuracy(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "reward_model.json").write_text("of an earlier attempt with other settings")
    run_dir, _ = run_reward_model(make_config(tmp_path), toy(8, seed=0))
    assert (run_dir / "reward_model").is_dir() and not (run_dir / "reward_model.json").exists()


def test_a_model_that_its_last_update_broke_is_not_published(tmp_path: Path) -> None:
    config = make_config(tmp_path, optimizer={"lr": 1e39, "schedule": "constant"})
    with pytest.raises(FloatingPointError, match="reward_model: the reward model has weights that are not finite"):
        run_reward_model(config, toy(8, seed=0))
    run_dir = tmp_path / "run"
    assert not (run_dir / "reward_model").exists() and not (run_dir / "reward_model.json").exists()
    assert not list((run_dir / "checkpoints").rglob("checkpoint_*"))


def test_bad_data_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no comparison with a preference"):
        run_reward_model(make_config(tmp_path), toy(2, seed=0, heldout=True))
    long = RankedAnswers("x", "", (2,) * 1020, ("a", "b"), ((5,) * 9, (6,) * 3), None, "toy")
    with pytest.raises(UserError, match="1029 tokens and the model's context is 1024"):
        run_reward_model(make_config(tmp_path), [long])
