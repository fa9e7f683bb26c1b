"""Causal attention in blocks of queries, as plain products of matrices.

PyTorch's fused attention for the CPU takes two to three times as long, forward and backward together, as products in
bfloat16 do (PyTorch 2.13, AVX-512 BF16, windows of 512, heads of 64).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

NAME = "in_blocks"
BLOCK = 128
"""Queries of a block. Each sees the keys up to its own, so some 60 % of the scores of a window of 512 are computed."""


def in_blocks(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """The attention of windows without padding, in the form that transformers calls.

    Args:
        module: not used.
        query: [B, heads, T, D], as `key` and `value`.
        mask: not used; every token sees those before it and itself.
        scaling: of the scores.

    Returns:
        [B, T, heads, D], and no weights.
    """
    later = torch.full((BLOCK, BLOCK), float("-inf"), dtype=query.dtype, device=query.device).triu(1)
    blocks = []
    for begin in range(0, query.shape[2], BLOCK):
        end = min(begin + BLOCK, query.shape[2])
        scores = (scaling * query[:, :, begin:end]) @ key[:, :, :end].transpose(-1, -2)
        own = scores[..., begin:] + later[: end - begin, : end - begin]
        weights = torch.cat([scores[..., :begin], own], -1).softmax(-1)
        blocks.append(weights.to(value.dtype) @ value[:, :, :end])  # autocast makes the softmax float32
    return torch.cat(blocks, 2).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, in_blocks)
