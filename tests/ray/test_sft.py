"""SFT on the embedded model and data, in this process. test_workers has it on two Ray Train workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from actors.pools.remote import Remote
from actors.training.sft import DevPrompt
from rayrlhf.data.rows import Row
from rayrlhf.errors import UserError
from rayrlhf.models.loading import load_policy
from rayrlhf.trajectory import GenerationRequest, Sampling, derive_seed
from tests.ray.sft_runs import (
    MAX_RESPONSE,
    TINY,
    StopsAfter,
    TransformersCoordinator,
    demonstrations,
    distance,
    make_config,
    run_sft,
    start_weights,
    weights,
)


@pytest.fixture(scope="module")
def data() -> tuple[list[Row], list[DevPrompt]]:
    return demonstrations()


def changed(directory: Path) -> set[str]:
    """Kinds of layers whose weights are not the embedded model's."""
    now, before = (load_file(Path(path) / "model.safetensors") for path in (directory, TINY))
    return {name.split(".")[-2] for name in before if not torch.equal(now[name], before[name])}


def test_learns_and_keeps_the_best_checkpoint(tmp_path: Path, data: tuple[list[Row], list[DevPrompt]]) -> None:
    coordinator = TransformersCoordinator(TINY)
    config = make_config(tmp_path, epochs=2, evals_per_epoch=2)
    run_dir, metrics = run_sft(config, data, Remote("coordinator", coordinator, local=True))
    assert [m["step"] for m in metrics] == list(range(13))
    evaluations = [m for m in metrics if "sft/rouge1" in m]
    assert [m["step"] for m in evaluations] == [3, 6, 9, 12]
    assert evaluations[-1]["sft/dev_loss"] < metrics[0]["sft/dev_loss"] - 0.03
    assert coordinator.versions == [1, 2, 3, 4]

    best = max(evaluations, key=lambda m: m["sft/rouge_mean"])
    assert best["sft/rouge_mean"] == pytest.approx(
        np.mean([best["sft/rouge1"], best["sft/rouge2"], best["sft/rougeL"]])
    )
    # The saved model is the best one: its dev loss, by transformers' own loss row by row, is the one recorded then.
    model = AutoModelForCausalLM.from_pretrained(run_dir / "sft").eval()
    total = tokens = 0.0
    with torch.no_grad():
        for prompt in data[1]:
            ids = torch.tensor([[*prompt.prompt_ids, *prompt.response_ids]])
            labels = torch.tensor([[-100] * len(prompt.prompt_ids) + list(prompt.response_ids)])
            total += float(model(input_ids=ids, labels=labels).loss) * len(prompt.response_ids)
            tokens += len(prompt.response_ids)
    assert best["sft/dev_loss"] == pytest.approx(total / tokens, rel=1e-4)
    # ... and answers as it did then.
    again = TransformersCoordinator(str(run_dir / "sft"))
    requests = [GenerationRequest(p.id, p.prompt_ids, 0, derive_seed(3, "sft-eval", p.id)) for p in data[1][:8]]
    again.generate(requests, Sampling(0.01, MAX_RESPONSE, 2), 0)
    assert again.answers[0] == coordinator.answers[evaluations.index(best)]


def test_weights_do_not_depend_on_the_micro_batch_size(tmp_path: Path, data: tuple[list[Row], list[DevPrompt]]) -> None:
    found = []
    for micro_batch_tokens in (200, 100_000):
        config = make_config(tmp_path / str(micro_batch_tokens), micro_batch_tokens=micro_batch_tokens)
        found.append(weights(run_sft(config, (data[0][:48], data[1]))[0] / "sft"))
    assert distance(found[0], start_weights()) > 1e-3
    assert distance(found[0], found[1]) < 1e-5


# With adapters it is a second group of workers; ray/test_learner continues such a run to the last bit.
@pytest.mark.parametrize("lora", [None, pytest.param({"rank": 8}, marks=pytest.mark.long)])
def test_a_killed_run_continues_and_ends_as_if_nothing_had_happened(
    tmp_path: Path, data: tuple[list[Row], list[DevPrompt]], lora: dict[str, Any] | None
) -> None:
    settings: dict[str, Any] = {"epochs": 2, "evals_per_epoch": 2, "eval_prompts": 4, "lora": lora}
    data = (data[0][:48], data[1])
    undisturbed = TransformersCoordinator(TINY)
    whole, _ = run_sft(make_config(tmp_path / "whole", **settings), data, Remote("c", undisturbed, local=True))
    config = make_config(tmp_path / "broken", **settings)
    # First it is asked to stop, at a step after which nothing is measured, and then its generators die.
    early, stop = TransformersCoordinator(TINY), Remote("stop", StopsAfter(1), local=True)
    _, metrics = run_sft(config, data, Remote("c", early, local=True), stop=stop)
    assert [m["step"] for m in metrics] == [0, 1] and early.versions == []
    dying = TransformersCoordinator(TINY, fail_after=2)
    with pytest.raises(ConnectionError):
        run_sft(config, data, Remote("c", dying, local=True))
    run_dir = Path(config.runs_dir) / "run"
    assert not (run_dir / "sft").exists()  # nothing looks finished
    # The new coordinator knows no versions: the learner's own count keeps them rising.
    late = TransformersCoordinator(TINY)
    late.loaded = 2
    _, metrics = run_sft(config, data, Remote("c", late, local=True))
    assert late.versions == [3, 4]
    assert [m["step"] for m in metrics] == list(range(7))
    assert torch.equal(weights(run_dir / "sft"), weights(whole / "sft"))
    if lora:
        assert changed(run_dir / "sft") == {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}
    assert dying.answers + late.answers == undisturbed.answers


def test_stops_early_and_returns_the_best(tmp_path: Path, data: tuple[list[Row], list[DevPrompt]]) -> None:
    config = make_config(
        tmp_path, epochs=8, evals_per_epoch=3, patience=2, optimizer={"lr": 3e-2, "schedule": "constant"}, batch_size=32
    )
    run_dir, metrics = run_sft(config, data)
    losses = {m["step"]: m["sft/dev_loss"] for m in metrics if m["step"] and "sft/dev_loss" in m}
    last, best = max(losses), min(losses, key=losses.__getitem__)
    assert last < 24 and last == best + 2
    state = torch.load(next((run_dir / "checkpoints" / "sft").glob("checkpoint_*")) / "state.pt", weights_only=True)
    assert state["step"] == last and state["progress"]["best"] == pytest.approx(-losses[best])
    assert not torch.equal(load_policy(str(run_dir / "sft")).get_input_embeddings().weight,
                           state["model"]["model.decoder.embed_tokens.weight"])  # fmt: skip


def test_loss_on_all_counts_every_token_but_the_first(tmp_path: Path, data: tuple[list[Row], list[DevPrompt]]) -> None:
    rows = data[0][:16]
    _, metrics = run_sft(make_config(tmp_path, loss_on="all"), (rows, data[1]))
    assert metrics[1]["sft/tokens"] == sum(len(row.ids) - 1 for row in rows)
    _, metrics = run_sft(make_config(tmp_path / "completion"), (rows, data[1]))
    assert metrics[1]["sft/tokens"] == sum(int(row.mask.sum()) for row in rows)


def test_gradient_checkpointing_ends_with_the_same_weights(
    tmp_path: Path, data: tuple[list[Row], list[DevPrompt]]
) -> None:
    config, rows = make_config(tmp_path), (data[0][:48], data[1][:4])
    kept, metrics = run_sft(config, rows)
    assert metrics[1]["memory/learner_peak_mib"] > 100
    learner = config.resources.learner.model_copy(update={"gradient_checkpointing": True})
    config = make_config(tmp_path / "again")
    resources = config.resources.model_copy(update={"learner": learner})
    again, _ = run_sft(config.model_copy(update={"resources": resources}), rows)
    torch.testing.assert_close(weights(again / "sft"), weights(kept / "sft"), rtol=0, atol=1e-6)


def test_a_model_that_its_last_update_broke_is_not_published(
    tmp_path: Path, data: tuple[list[Row], list[DevPrompt]]
) -> None:
    """One step, whose gradient is finite and whose learning rate is beyond float32."""
    config = make_config(tmp_path, optimizer={"lr": 1e39, "schedule": "constant"})
    with pytest.raises(FloatingPointError, match="sft: the model has weights that are not finite after the last upd"):
        run_sft(config, (data[0][:16], data[1]))
    run_dir = tmp_path / "run"
    assert not (run_dir / "sft").exists() and not list((run_dir / "checkpoints").rglob("*.safetensors"))
    assert not list((run_dir / "checkpoints").rglob("checkpoint_*"))


def test_bad_data_is_one_line(tmp_path: Path, data: tuple[list[Row], list[DevPrompt]]) -> None:
    long = Row.completion([2] * 1000, [5] * 25)
    with pytest.raises(UserError, match="1025 tokens and the model's context is 1024"):
        run_sft(make_config(tmp_path), ([long], data[1]))
    with pytest.raises(UserError, match="0 demonstrations"):
        run_sft(make_config(tmp_path), ([], data[1]))
