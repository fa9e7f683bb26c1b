"""Runs of SFT that several tests share: the embedded data, a coordinator without vLLM, and a comparison of weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from actors.pools.remote import Remote, put
from actors.rollouts.weight_sync import Publication
from actors.training.sft import DevPrompt, SFTArguments, sft_loop
from actors.training.tasks import StopRequest
from actors.training.workers import Workers
from rayrlhf.config import Config
from rayrlhf.config_data import DatasetConfig
from rayrlhf.config_file import parse_config
from rayrlhf.data.rows import Row
from rayrlhf.data.sources import read_demonstrations
from rayrlhf.data.tokens import decode_response, encode_prompts, encode_responses
from rayrlhf.models.loading import load_policy, load_tokenizer, resolve_model
from rayrlhf.runs.metrics import read_metrics
from rayrlhf.trajectory import GenerationRequest, Sampling, Trajectory

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


class StopsAfter(StopRequest):
    """Asks a loop to stop at the end of its step number `steps`."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.left = steps

    def stop_requested(self) -> bool:
        self.left -= 1
        return self.left == 0


def demonstrations() -> tuple[list[Row], list[DevPrompt]]:
    """96 demonstrations and 24 dev prompts of the embedded TL;DR data."""
    tokenizer = load_tokenizer(TINY)

    def encoded(split: Any, count: int) -> list[tuple[Any, list[int], list[int]]]:
        records = read_demonstrations(
            [DatasetConfig(format="tldr", path="embedded:tldr")], split, tokenizer, MAX_PROMPT
        )
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
    config: Config,
    data: tuple[list[Row], list[DevPrompt]],
    coordinator: Remote | None = None,
    workers: Workers | None = None,
    stop: Remote | None = None,
) -> tuple[Path, list[dict[str, Any]]]:
    """The run folder and its metrics, of a run in this process unless `workers` are given."""
    own = workers is None
    run_dir = Path(config.runs_dir) / config.name
    train, dev = data
    arguments = SFTArguments(
        config, str(run_dir), "sft", 1, TINY, put(train, own), put(dev, own), coordinator, stop=stop
    )  # fmt: skip
    workers = workers or Workers(config.resources.learner, str(run_dir / "checkpoints"), "sft", local=True)
    workers.train(sft_loop, arguments)
    return run_dir, read_metrics(run_dir, "sft")


def weights(directory: Path) -> torch.Tensor:
    tensors = load_file(directory / "model.safetensors")
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


def start_weights() -> torch.Tensor:
    model = load_policy(TINY)
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])
