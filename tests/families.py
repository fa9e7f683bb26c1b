"""A tiny random model of every architecture family that the library is tested with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Ernie4_5Config,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Qwen2Config,
    Qwen3Config,
)

from rayrlhf.models.loading import resolve_model

V = 96
TINY = resolve_model("embedded:opt-tiny")
OPT = {
    "vocab_size": V, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "word_embed_proj_dim": 32,
}  # fmt: skip
LLAMA: dict[str, Any] = {
    "vocab_size": V, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 1,
}  # fmt: skip
FAMILIES = {
    "opt": OPTConfig(**OPT, dropout=0.1, layerdrop=0.1),
    "opt-untied-projected": OPTConfig(**{**OPT, "word_embed_proj_dim": 16}, tie_word_embeddings=False),
    "opt-post-norm": OPTConfig(**{**OPT, "word_embed_proj_dim": 16}, do_layer_norm_before=False),
    "gpt-j": GPTJConfig(vocab_size=V, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=64),
    "gpt-2": GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "gpt-neox": GPTNeoXConfig(
        vocab_size=V, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, attention_dropout=0.1, hidden_dropout=0.1,
    ),
    "bloom": BloomConfig(vocab_size=V, hidden_size=32, n_layer=2, n_head=4, hidden_dropout=0.1, attention_dropout=0.1),
    "llama": LlamaConfig(**LLAMA),
    "mistral": MistralConfig(**LLAMA, sliding_window=None),
    "qwen2": Qwen2Config(**LLAMA, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**LLAMA, head_dim=8),
    "ernie": Ernie4_5Config(**LLAMA, head_dim=8),  # transformers has no classifier of it
}  # fmt: skip


def write_model(config: Any, directory: Path, std: float = 0.3, auto: Any = AutoModelForCausalLM) -> Path:
    """A random model of `config`; large weights, so that positions, masks and dropout would all show."""
    config.pad_token_id, config.bos_token_id, config.eos_token_id = 1, 2, 2
    torch.manual_seed(0)
    model = auto.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, std)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.1)
    model.save_pretrained(directory)
    tokenizer = json.loads((Path(TINY) / "tokenizer.json").read_text())
    vocabulary = {token: id for token, id in tokenizer["model"]["vocab"].items() if id < V}  # a row for every token
    tokenizer["model"] |= {"vocab": vocabulary, "merges": []}
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    shutil.copy(Path(TINY) / "tokenizer_config.json", directory)
    return directory
