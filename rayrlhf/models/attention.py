"""Attention over a packed row: all tokens of a batch in one line, without padding and without a mask over all of it.

`packed_attention` is registered with transformers under the name `PACKED`. A model that uses it computes everything but
the attention on the line as it lies, and calls `packed_attention` in each layer. That function cuts the line into
pieces, so that a token attends to its own sequence only. For example, two answers to one prompt and a row by itself:

    line    P P P P A A A B B C C C C C     P the prompt, A and B its answers, C the other row
    pieces  (1 x 4)  (1 x 5, mask)  (1 x 5)
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
"""Model types for which tests show that packed rows give what each row gives by itself.

Their attention can be replaced as a whole: it has no parts of its own, such as soft caps or sinks.
"""


class Piece(NamedTuple):
    """Tokens that lie behind one another in a packed row and share one call of the attention."""

    sequences: int
    """How many sequences there are, all of the same length."""
    length: int
    """Tokens of each sequence."""
    mask: Tensor | None = None
    """None: each sequence is causal, by itself. Otherwise the piece holds the answers to the most recent piece without
    a mask, their shared prompt. Then the mask is [length, prompt + length] bool, and mask[i, j] says whether answer
    token i sees position j of prompt and answers."""


def packs(model: PreTrainedModel) -> bool:
    """Whether the model can compute packed rows; if not, its batches are padded (see `rayrlhf.models.batching`)."""
    config = model.config
    # transformers expresses a sliding window in the mask over the whole line, which packed rows do without.
    windowed = getattr(config, "use_sliding_window", True) and getattr(config, "sliding_window", None)
    return config.model_type in _TESTED and not windowed


def packed_arguments(model: PreTrainedModel, pieces: Sequence[Piece], positions: Tensor) -> dict[str, Any]:
    """Switch the model to `packed_attention`, and give what its base model needs beside the ids of a packed row.

    A call without `pieces` still gets transformers' own attention, so the model can be used for anything else as
    before. transformers does not save the name of the attention with a model.

    Args:
        model: one that `packs`.
        pieces: of the whole row, in order.
        positions: [1, T] int64, from 0 in each sequence.

    Returns:
        Keyword arguments for the base model.
    """
    # Never switched back: with gradient checkpointing the backward pass computes the layers again, and needs it.
    if model.config._attn_implementation != PACKED:
        model.set_attn_implementation(PACKED)
    # Positions that start again would make transformers build a mask. It builds none if it gets one that hides nothing.
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
    """The attention of each piece by itself, with the signature of transformers' attention functions.

    Args:
        module: the attention layer that calls.
        query: [1, heads, T, d].
        key: [1, key-value heads, T, d].
        value: [1, key-value heads, T, d].
        attention_mask: used only without `pieces`, as are `dropout` and other arguments.
        scaling: of the products of query and key; None is 1 / sqrt(d).
        pieces: from `packed_arguments`, which the model passes on to every layer.

    Returns:
        [1, T, heads, d], and None where transformers' functions may return attention weights.
    """
    if pieces is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    groups = getattr(module, "num_key_value_groups", 1)
    sizes = [piece.sequences * piece.length for piece in pieces]
    # One split, not a slice for each piece: the gradient of a slice is a tensor as large as the whole row.
    parts = zip(*(each.split(sizes, dim=2) for each in (query, repeat_kv(key, groups), repeat_kv(value, groups))),
                strict=True)  # fmt: skip
    found = []
    prompt: tuple[Tensor, Tensor] | None = None
    for piece, (q, k, v) in zip(pieces, parts, strict=True):
        if piece.mask is None:
            prompt = k, v  # in case that the next piece holds answers to it
            q, k, v = (each[0].unflatten(1, (piece.sequences, piece.length)).transpose(0, 1) for each in (q, k, v))
        else:
            assert prompt is not None
            k, v = torch.cat([prompt[0], k], dim=2), torch.cat([prompt[1], v], dim=2)
        mixed = scaled_dot_product_attention(q, k, v, piece.mask, is_causal=piece.mask is None, scale=scaling)
        found.append(mixed.transpose(1, 2).flatten(0, 1))
    return (torch.cat(found) if len(found) > 1 else found[0]).unsqueeze(0), None


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)
