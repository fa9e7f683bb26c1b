"""Micro-batches that a run chooses: by what models take of memory, which is measured here, up to a useful size."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, LlamaConfig, OPTConfig, Qwen3Config

from jobs import choices
from jobs.choices import with_resources
from rayrlhf.config import Config
from rayrlhf.config_file import parse_config
from rayrlhf.data.rows import Row
from rayrlhf.machine import Machine
from rayrlhf.models.batching import pack
from rayrlhf.models.logprobs import LOGITS, token_logprobs
from rayrlhf.models.micro_batches import Needs, needs
from rayrlhf.runs.changes import config_changes

GIB = 2**30
SIZE: dict[str, Any] = {
    "vocab_size": 16, "hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 256,
}  # fmt: skip
MODELS = {
    "opt": OPTConfig(**SIZE, ffn_dim=512, word_embed_proj_dim=128),
    "gpt-2": GPT2Config(vocab_size=16, n_embd=128, n_layer=3, n_head=4, n_positions=256),
    "gpt-neox": GPTNeoXConfig(**SIZE, intermediate_size=512),
    "llama": LlamaConfig(**SIZE, intermediate_size=448, num_key_value_heads=1),
    "qwen3": Qwen3Config(**SIZE, intermediate_size=384, num_key_value_heads=2, head_dim=32),
}


def config(**settings: Any) -> Config:
    lengths = {"max_prompt_tokens": 100, "max_response_tokens": 28}
    return parse_config({"name": "a", "data": lengths, **settings}, "test")


@pytest.fixture
def model(tmp_path: Path) -> str:
    MODELS["llama"].save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.mark.parametrize("name", MODELS)
def test_a_token_takes_no_more_than_is_counted(name: str, tmp_path: Path) -> None:
    """Against what autograd keeps of a packed pass, each storage once; and not a fraction of what is counted."""
    MODELS[name].save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_config(MODELS[name]).eval()
    draw = torch.Generator().manual_seed(0)
    rows = [Row.completion(*torch.randint(3, 16, (2, 80), generator=draw).tolist()) for _ in range(3)]
    batch = pack(rows)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        logprobs = token_logprobs(model, batch)
    assert logprobs.requires_grad
    measured = sum(kept.values()) / batch.input_ids.numel()
    counted = needs(config(), str(tmp_path))["learner"].token
    assert counted / 3 < measured <= counted


def test_states_are_those_of_adam_and_of_both_models(model: str) -> None:
    policy = AutoModelForCausalLM.from_config(MODELS["llama"])
    optimiser = torch.optim.AdamW(policy.parameters(), lr=0.1)
    sum(parameter.sum() for parameter in policy.parameters()).backward()
    optimiser.step()
    moments = [m for state in optimiser.state.values() for m in state.values() if m.numel() > 1]
    tensors = [*policy.parameters(), *(p.grad for p in policy.parameters() if p.grad is not None), *moments]
    held = sum(tensor.nbytes for tensor in tensors)
    weights = sum(parameter.nbytes for parameter in policy.parameters())

    found = needs(config(), model)
    assert found["learner"].states == 2 * held, "PPO has a value model"
    assert found["scorers"].states == 2 * weights
    assert needs(config(rl={"algorithm": "grpo", "samples_per_prompt": 2}), model)["learner"].states == held
    frozen = needs(config(model={"lora": {"rank": 1}}), model)["learner"].states
    assert 2 * weights < frozen < 2.2 * weights
    kept = needs(config(resources={"learner": {"gradient_checkpointing": True}}), model)["learner"].token
    assert kept < 0.5 * found["learner"].token


@pytest.mark.parametrize(
    ("room", "longest", "tokens"),
    [
        (math.inf, 100, 4096),
        (1000 + 4096 * 10, 100, 4096),
        (999 + 4096 * 10, 100, 2048),
        (1000 + 512 * 10, 100, 512),
        (1000 + 512 * 10, 700, 700),  # a longest row
        (0, 100, 100),  # what is too small shows by itself
        (math.inf, 5000, 5000),
    ],
)
def test_half_of_what_does_not_fit(room: float, longest: int, tokens: int) -> None:
    assert Needs(1000, 10, 0).fitting(room, 4096, longest) == tokens


def test_logits_count_up_to_those_that_are_held_at_once() -> None:
    # Three times four bytes of each.
    assert Needs(5, 1, 1000).bytes(10) == 5 + 10 + 12 * 10 * 1000
    assert Needs(5, 1, 10**6).bytes(4096) == 5 + 4096 + 12 * LOGITS


def chosen(given: Config) -> dict[str, int]:
    sections = {stage: getattr(given, stage) for stage in ("sft", "reward_model", "dpo", "rl")}
    return {name: s.micro_batch_tokens for name, s in {**sections, "scorers": given.resources.scorers}.items()}


def test_what_is_not_given_is_chosen(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices, "this_machine", lambda: Machine(2, 0, 100 * GIB))
    found, line = with_resources(config(rl={"micro_batch_tokens": 99}), model)
    assert line is not None and line.endswith(
        "; micro_batch_tokens=4096 of sft, reward_model (more is hardly faster)"
        "; micro_batch_tokens=8192 of scorers (more is hardly faster)"
    )
    assert chosen(found) == {"sft": 4096, "reward_model": 4096, "dpo": 4096, "rl": 99, "scorers": 8192}
    assert with_resources(found, model)[0] == found

    # Of 256 MiB the learner has a half. Its models and their moments take 2 * 16 bytes of 0.6 million parameters, and
    # 32 * 4 * 128 * 3 bytes are a token's: 2048 fit and 4096 do not. A scorer has a quarter, and keeps one layer.
    monkeypatch.setattr(choices, "this_machine", lambda: Machine(2, 0, GIB / 4))
    found, line = with_resources(config(), model)
    assert line is not None and "micro_batch_tokens=2048 of sft, reward_model, rl (by 0.1 GiB of memory)" in line
    assert chosen(found)["scorers"] == 2048


def test_a_gpu_s_own_memory_counts(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def of(gpu_memory: float) -> dict[str, int]:
        monkeypatch.setattr(choices, "this_machine", lambda: Machine(8, 1, GIB, gpu_memory))
        return chosen(with_resources(config(), model)[0])

    large, small = of(80 * GIB), of(GIB)
    assert (large["sft"], large["scorers"]) == (32768, 65536)
    # The learner has 0.4 * 0.9 GiB of it, the scorer 0.2 * 0.9.
    assert (small["sft"], small["scorers"]) == (4096, 8192)


def test_another_micro_batch_binds_no_stage() -> None:
    before, after = {"sft": {"micro_batch_tokens": 1, "epochs": 1}}, {"sft": {"micro_batch_tokens": 2, "epochs": 2}}
    stages = {change.key: change.stages for change in config_changes(before, after)}
    assert stages["sft.micro_batch_tokens"] == () and stages["sft.epochs"][0] == "sft"
