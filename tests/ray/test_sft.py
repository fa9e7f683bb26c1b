"""SFT on the embedded model and data: in this process for most tests, on two Ray Train workers for one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from actors.pools.remote import Remote, put
from actors.rollouts.weight_sync import Publication
from actors.training.sft import DevPrompt, SFTArguments, sft_loop
from actors.training.workers import Workers
from rayrlhf.config import Config, DatasetConfig
from rayrlhf.config_file import parse_config
from rayrlhf.data.rows import Row
from rayrlhf.data.sources import read_demonstrations
from rayrlhf.data.tokens import decode_response, encode_prompts, encode_responses
from rayrlhf.errors import UserError
from rayrlhf.models.loading import load_policy, load_tokenizer, resolve_model
from rayrlhf.runs.metrics import read_metrics
from rayrlhf.trajectory import GenerationRequest, Sampling, Trajectory, derive_seed

TINY = resolve_model("embedded:opt-tiny")
MAX_PROMPT, MAX_RESPONSE = 96, 24


class TransformersCoordinator:
    """A rollout coordinator by `transformers.generate`: the same three calls, another engine."""

    def __init__(self, model: str, fail_after: int | None = None) -> None:
        self.model, self.tokenizer = load_policy(model), load_tokenizer(model)
        self.handed_out = self.loaded = 0
        self.versions: list[int] = []
        self.answers: list[list[str]] = []
        self.fail_after = fail_after

    def next_version(self, after: int = 0) -> int:
        self.handed_out = max(self.handed_out, after) + 1
        return self.handed_out

    def load_weights(self, publication: Publication) -> int:
        if self.fail_after == len(self.versions):
            raise ConnectionError("the generators are gone")
        assert publication.version > self.loaded
        self.loaded = publication.version
        self.versions.append(publication.version)
        parameters = dict(self.model.named_parameters())
        arrived = dict(publication.tensors())
        assert arrived.keys() == parameters.keys()
        with torch.no_grad():
            for name, tensor in arrived.items():
                parameters[name].copy_(tensor)
        return publication.version

    def generate(self, requests: Sequence[GenerationRequest], sampling: Sampling, version: int) -> list[Trajectory]:
        assert version == self.loaded
        pad, longest = self.tokenizer.pad_token_id, max(len(r.prompt_ids) for r in requests)
        ids = torch.tensor([[pad] * (longest - len(r.prompt_ids)) + list(r.prompt_ids) for r in requests])
        mask = torch.tensor([[0] * (longest - len(r.prompt_ids)) + [1] * len(r.prompt_ids) for r in requests])
        torch.manual_seed(requests[0].seed)
        out = self.model.generate(
            ids, attention_mask=mask, do_sample=True, temperature=sampling.temperature, top_k=0,
            max_new_tokens=sampling.max_tokens, eos_token_id=sampling.eos_token_id, pad_token_id=pad,
            output_scores=True, return_dict_in_generate=True,
        )  # fmt: skip
        logprobs = self.model.compute_transition_scores(out.sequences, out.scores, normalize_logits=True)
        trajectories = []
        for request, row, scores in zip(requests, out.sequences[:, longest:].tolist(), logprobs, strict=True):
            ended = sampling.eos_token_id in row
            length = row.index(sampling.eos_token_id) + 1 if ended else len(row)
            trajectories.append(
                Trajectory(
                    request.prompt_id, request.sample_index, request.seed, np.array(request.prompt_ids),
                    np.array(row[:length]), scores[:length].numpy(), np.full(length, version),
                    "eos" if ended else "length",
                )
            )  # fmt: skip
        self.answers.append([decode_response(self.tokenizer, t.response_ids.tolist()) for t in trajectories])
        return trajectories


def make_config(tmp_path: Path, lora: dict[str, Any] | None = None, **sft: Any) -> Config:
    settings = {"batch_size": 16, "eval_prompts": 8, "optimizer": {"lr": 3e-4, "warmup_fraction": 0.1}} | sft
    return parse_config(
        {
            "name": "run", "runs_dir": str(tmp_path), "seed": 3, "sft": settings, "model": {"lora": lora},
            "data": {"max_prompt_tokens": MAX_PROMPT, "max_response_tokens": MAX_RESPONSE},
            "resources": {"learner": {"max_failures": 0}},
        },
        "test",
    )  # fmt: skip


@pytest.fixture(scope="module")
def data() -> tuple[list[Row], list[DevPrompt]]:
    """96 demonstrations and 24 dev prompts of the embedded TL;DR data."""
    tokenizer = load_tokenizer(TINY)

    def encoded(split: Any, count: int) -> list[tuple[Any, list[int], list[int]]]:
        records = read_demonstrations(DatasetConfig(format="tldr", path="embedded:tldr"), split, tokenizer, MAX_PROMPT)
        records = records[:count]
        prompts = encode_prompts(tokenizer, [r.prompt for r in records])
        responses = encode_responses(
            tokenizer, [r.response for r in records], MAX_RESPONSE, [r.prompt for r in records]
        )
        return list(zip(records, prompts, responses, strict=True))

    train = [Row.completion(prompt, response) for _, prompt, response in encoded("train", 96)]
    dev = [DevPrompt(r.id, tuple(p), tuple(a), r.response) for r, p, a in encoded("valid", 24)]
    return train, dev


def run_sft(
    config: Config, data: tuple[list[Row], list[DevPrompt]], coordinator: Remote | None = None, local: bool = True
) -> tuple[Path, list[dict[str, Any]]]:
    run_dir = Path(config.runs_dir) / config.name
    train, dev = data
    arguments = SFTArguments(
        config, str(run_dir), "sft", 1, TINY, put(train, local), put(dev, local), coordinator
    )  # fmt: skip
    workers = Workers(config.resources.learner, str(run_dir / "checkpoints"), "sft", local)
    workers.train(sft_loop, arguments)
    workers.close()
    return run_dir, read_metrics(run_dir, "sft")


def weights(directory: Path) -> torch.Tensor:
    tensors = load_file(directory / "model.safetensors")
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def changed(directory: Path) -> set[str]:
    """Kinds of layers whose weights are not the embedded model's."""
    now, before = (load_file(Path(path) / "model.safetensors") for path in (directory, TINY))
    return {name.split(".")[-2] for name in before if not torch.equal(now[name], before[name])}


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


def start_weights() -> torch.Tensor:
    model = load_policy(TINY)
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


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


@pytest.mark.parametrize("lora", [None, {"rank": 8}])
def test_a_killed_run_continues_and_ends_as_if_nothing_had_happened(
    tmp_path: Path, data: tuple[list[Row], list[DevPrompt]], lora: dict[str, Any] | None
) -> None:
    settings: dict[str, Any] = {"epochs": 2, "evals_per_epoch": 2, "eval_prompts": 4, "lora": lora}
    data = (data[0][:48], data[1])
    undisturbed = TransformersCoordinator(TINY)
    whole, _ = run_sft(make_config(tmp_path / "whole", **settings), data, Remote("c", undisturbed, local=True))
    config = make_config(tmp_path / "broken", **settings)
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


def test_two_ray_train_workers_end_with_the_weights_of_one(
    tmp_path: Path, data: tuple[list[Row], list[DevPrompt]], ray_cluster: None
) -> None:
    """Three steps on two gloo workers, with the coordinator in a third process, against the same in this process."""
    rows = (data[0][:45], data[1])  # the last batch is smaller
    coordinator = Remote.spawn("c", TransformersCoordinator, TINY, local=False, options={"num_cpus": 0})
    alone = make_config(tmp_path / "one", micro_batch_tokens=500)
    one, _ = run_sft(alone, rows, Remote("c", TransformersCoordinator(TINY), local=True))
    config = alone.model_copy(
        update={
            "runs_dir": str(tmp_path / "two"),
            "resources": alone.resources.model_copy(
                update={"learner": alone.resources.learner.model_copy(update={"workers": 2})}
            ),
        }
    )
    two, metrics = run_sft(config, rows, coordinator, local=False)
    assert [m["step"] for m in metrics] == [0, 1, 2, 3]
    moved = distance(weights(one / "sft"), start_weights())
    assert distance(weights(two / "sft"), weights(one / "sft")) < min(1e-5, 1e-2 * moved)
    for ours, theirs in zip(metrics, read_metrics(one, "sft"), strict=True):
        assert (
            ours["sft/dev_loss"] == pytest.approx(theirs["sft/dev_loss"], rel=1e-5) if "sft/dev_loss" in ours else True
        )
    assert metrics[-1]["sft/rouge1"] == pytest.approx(read_metrics(one, "sft")[-1]["sft/rouge1"], abs=0.05)
    assert any((two / "checkpoints" / "sft").glob("checkpoint_*/state.pt"))
