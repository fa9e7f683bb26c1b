"""Attention over a packed row: every token of a batch in one line, without padding and without a mask over all of it.

Registered with transformers, whose models then compute everything but the attention on the tokens as they lie, and hand
the attention to `packed_attention`, which sees to it that tokens attend to their own sequence only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PACKED = "rayrlhf_packed"

_TESTED = {"opt", "gpt2", "gpt_neox", "llama", "mistral", "qwen2", "qwen3"}
"""Architectures whose attention is exchangeable and has nothing of its own (soft caps, sinks), as tests show."""


class Piece(NamedTuple):
    """What is attended to at once: tokens that lie behind one another in a packed row."""

    sequences: int
    """How many, equally long."""
    length: int
    """Tokens of each."""
    mask: Tensor | None = None
    """None: each sequence is causal by itself. Else the piece is answers to the prompt that is the last piece without a
    mask, and this is [length, prompt + length] bool: what each of their tokens sees of prompt and answers."""


def packs(model: PreTrainedModel) -> bool:
    """Whether the model computes packed rows; else its batches are padded rectangles (`rayrlhf.models.batching`)."""
    config = model.config
    # A sliding window is made of the mask that packed rows do without.
    windowed = getattr(config, "use_sliding_window", True) and getattr(config, "sliding_window", None)
    return config.model_type in _TESTED and not windowed


def packed_arguments(model: PreTrainedModel, pieces: Sequence[Piece], positions: Tensor) -> dict[str, Any]:
    """What the base model needs beside the ids of a packed row [1, T]; from now on it has our attention.

    Without `pieces` that attention is transformers' own, so the model can be used for anything else as before, and
    the name is not saved with it. The switch is not undone: a checkpointed backward pass computes layers again.
    """
    if model.config._attn_implementation != PACKED:
        model.set_attn_implementation(PACKED)
    # A mask without a hidden token keeps transformers from making one of the positions.
    return {"attention_mask": torch.ones_like(positions), "position_ids": positions, "pieces": pieces}


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    pieces: Sequence[Piece] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """[1, T, heads, d] of query [1, heads, T, d], key and value [1, key-value heads, T, d]; and no weights.

    The signature is that of transformers' attention functions; `pieces` comes from `packed_arguments` through the
    model's keyword arguments.
    """
    if pieces is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    groups = getattr(module, "num_key_value_groups", 1)
    sizes = [piece.sequences * piece.length for piece in pieces]
    # Split once: the gradient of a slice would be as large as the whole row.
    parts = zip(*(each.split(sizes, dim=2) for each in (query, repeat_kv(key, groups), repeat_kv(value, groups))),
                strict=True)  # fmt: skip
    found = []
    prompt: tuple[Tensor, Tensor] | None = None
    for piece, (q, k, v) in zip(pieces, parts, strict=True):
        if piece.mask is None:
            prompt = k, v
            q, k, v = (each[0].unflatten(1, (piece.sequences, piece.length)).transpose(0, 1) for each in (q, k, v))
        else:
            assert prompt is not None
            k, v = torch.cat([prompt[0], k], dim=2), torch.cat([prompt[1], v], dim=2)
        mixed = scaled_dot_product_attention(q, k, v, piece.mask, is_causal=piece.mask is None, scale=scaling)
        found.append(mixed.transpose(1, 2).flatten(0, 1))
    return (torch.cat(found) if len(found) > 1 else found[0]).unsqueeze(0), None


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)
