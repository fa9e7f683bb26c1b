"""Loading, saving and refusals of models and tokenizers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    OPTConfig,
    PreTrainedTokenizerBase,
)

from rayrlhf.errors import UserError
from rayrlhf.models.forward import autocast
from rayrlhf.models.loading import (
    check_vocabulary,
    context_length,
    load_policy,
    load_reward_model,
    load_tokenizer,
    parameter_counts,
    resolve_model,
)
from tests.families import FAMILIES, LLAMA, OPT, TINY, write_model


def test_fresh_head_has_the_published_scale_and_depends_on_its_seed_only(tmp_path: Path) -> None:
    path = str(write_model(OPTConfig(**{**OPT, "hidden_size": 2048, "word_embed_proj_dim": 2048, "ffn_dim": 8,
                                        "num_hidden_layers": 1}), tmp_path / "wide", std=0.01))  # fmt: skip
    heads = [load_reward_model(path, fresh_head_seed=seed).score for seed in (1, 1, 2)]
    assert torch.equal(heads[0].weight, heads[1].weight) and not torch.equal(heads[0].weight, heads[2].weight)
    assert heads[0].bias is None
    assert float(heads[0].weight.detach().std()) == pytest.approx(2049**-0.5, rel=0.05)


def test_existing_head_is_kept(tmp_path: Path) -> None:
    path = write_model(OPTConfig(**OPT, num_labels=1), tmp_path / "rm", auto=AutoModelForSequenceClassification)
    stored = load_file(path / "model.safetensors")["score.weight"]
    assert torch.equal(load_reward_model(str(path), fresh_head_seed=5).score.weight, stored)


@pytest.mark.parametrize(
    "config",
    [
        Gemma2Config(**{**LLAMA, "head_dim": 8}, final_logit_softcapping=30.0),
        CohereConfig(**LLAMA, logit_scale=0.0625),
        GraniteConfig(**LLAMA, logits_scaling=8.0),
    ],
    ids=["softcap", "scale", "scaling"],
)
def test_models_that_process_their_logits_are_refused(config: Any, tmp_path: Path) -> None:
    path = write_model(config, tmp_path / "model", std=0.02)
    with pytest.raises(UserError, match="scales or caps its logits"):
        load_policy(str(path))


def test_a_policy_is_no_reward_model_nor_the_other_way_round(tmp_path: Path) -> None:
    policy = write_model(OPTConfig(**OPT), tmp_path / "policy")
    reward = write_model(OPTConfig(**OPT, num_labels=1), tmp_path / "rm", auto=AutoModelForSequenceClassification)
    three = write_model(OPTConfig(**OPT, num_labels=3), tmp_path / "three", auto=AutoModelForSequenceClassification)
    with pytest.raises(UserError, match="no score head"):
        load_reward_model(str(policy))
    with pytest.raises(UserError, match="this is a reward model"):
        load_policy(str(reward))
    with pytest.raises(UserError, match="3 labels"):
        load_reward_model(str(three))


def test_resolve_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (Path(TINY) / "model.safetensors").is_file()
    assert resolve_model("facebook/opt-125m") == "facebook/opt-125m"
    with pytest.raises(UserError, match="known: embedded:opt-tiny"):
        resolve_model("embedded:opt-huge")
    with pytest.raises(UserError, match="no such directory"):
        resolve_model(str(tmp_path / "missing"))
    with pytest.raises(UserError, match="no such directory"):
        resolve_model("runs/mine/sft")
    model = tmp_path / "model"
    for complaint, name in (("config.json", "config.json"), ("safetensors", "model.safetensors"),
                            ("tokenizer", "tokenizer.json")):  # fmt: skip
        model.mkdir(exist_ok=True)
        with pytest.raises(UserError, match=complaint):
            resolve_model(str(model))
        shutil.copy(Path(TINY) / name, model)
    monkeypatch.chdir(tmp_path)
    assert resolve_model("model") == str(model)


def test_a_hub_name_that_cannot_be_had_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for load in (load_tokenizer, load_policy, load_reward_model, context_length):
        with pytest.raises(UserError, match="hub cannot be reached") as caught:
            load("nobody/no-such-model")
        assert "\n" not in str(caught.value)


def edited_tokenizer(directory: Path, **changes: Any) -> str:
    """The embedded model with other special tokens in its tokenizer_config.json."""
    shutil.copytree(TINY, directory)
    config = json.loads((directory / "tokenizer_config.json").read_text()) | changes
    kept = {key: value for key, value in config.items() if value is not None}
    (directory / "tokenizer_config.json").write_text(json.dumps(kept))
    return str(directory)


def test_pad_is_found_or_refused_and_never_the_eos(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(TINY)
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.padding_side) == ("<pad>", "</s>", "right")
    assert load_tokenizer(edited_tokenizer(tmp_path / "none", pad_token=None)).pad_token == "<pad>"
    assert load_tokenizer(edited_tokenizer(tmp_path / "eos", pad_token="</s>")).pad_token == "<pad>"
    with pytest.raises(UserError, match="no eos_token"):
        load_tokenizer(edited_tokenizer(tmp_path / "no-eos", eos_token=None))


def test_pad_without_a_spare_token(tmp_path: Path) -> None:
    """A vocabulary like GPT-2's: one special token, which is BOS, EOS and UNK at once."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    def write(name: str, vocab_size: int, unk: str) -> str:
        words = {"<|endoftext|>": 0, "a": 1, "b": 2, "<unknown>": 3}
        core = Tokenizer(models.WordLevel(words, unk_token=unk))
        core.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>", unk_token=unk)
        tokenizer.save_pretrained(tmp_path / name)
        GPT2Config(vocab_size=vocab_size, n_embd=8, n_layer=1, n_head=1).save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    assert load_tokenizer(write("unk", 4, "<unknown>")).pad_token == "<unknown>"
    spare_row = load_tokenizer(write("row", 5, "<|endoftext|>"))
    assert (spare_row.pad_token, spare_row.pad_token_id) == ("<pad>", 4)
    with pytest.raises(UserError, match="resize the model's embeddings"):
        load_tokenizer(write("full", 4, "<|endoftext|>"))


def test_check_vocabulary(tmp_path: Path) -> None:
    check_vocabulary(TINY, TINY)
    other: PreTrainedTokenizerBase = load_tokenizer(TINY)
    shutil.copytree(TINY, tmp_path / "other")
    other.add_tokens(["<new>"])
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="different tokenizers .1 tokens differ, such as '<new>'"):
        check_vocabulary(TINY, str(tmp_path / "other"))
    with pytest.raises(UserError, match="vocabulary of 96 rows"):
        check_vocabulary(TINY, str(write_model(OPTConfig(**OPT), tmp_path / "small")))


def test_context_length_of_families() -> None:
    assert context_length(TINY) == 1024
    lengths = {name: context_length(config) for name, config in FAMILIES.items()}
    assert lengths.pop("bloom") == 2048
    assert set(lengths.values()) == {64}


def test_autocast_computes_in_the_asked_type() -> None:
    layer, x = torch.nn.Linear(8, 8), torch.randn(2, 8)
    with autocast("cpu", "bfloat16"):
        assert layer(x).dtype == torch.bfloat16
    with autocast("cpu", "float32"):
        assert layer(x).dtype == torch.float32


def test_parameters_are_counted_without_loading() -> None:
    path = resolve_model("embedded:opt-tiny")
    total = sum(p.numel() for p in load_policy(path).parameters())
    assert parameter_counts(path) == (0, total)
