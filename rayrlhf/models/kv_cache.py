"""How much memory vLLM's cache of keys and values takes."""

from __future__ import annotations

import math

from rayrlhf.models.hub import read_config

_BLOCK = 32
"""Tokens of one block of the cache on a CPU, which `actors.rollouts.engine` asks for."""
_BYTES = {"float32": 4, "bfloat16": 2}


def kv_cache_mib(path: str, revision: str | None, dtype: str, sequences: int, tokens: int) -> int:
    """The MiB that so many sequences of so many tokens take at once, in whole blocks.

    Args:
        path: of the model, a directory or a hub name.
        revision: of a hub name.
        dtype: float32 or bfloat16.
        sequences: their number.
        tokens: of each, prompt and response.
    """
    config = read_config(path, revision).get_text_config()
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    stored = getattr(config, "num_key_value_heads", None) or heads  # fewer with grouped queries
    a_token = 2 * config.num_hidden_layers * stored * size * _BYTES[dtype]
    return math.ceil(sequences * math.ceil(tokens / _BLOCK) * _BLOCK * a_token / 2**20)
