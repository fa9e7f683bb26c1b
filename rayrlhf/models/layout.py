"""Where a model's parameters lie in memory."""

from __future__ import annotations

from collections.abc import Iterable

import torch

BUCKET_BYTES = 256 * 2**20
ALIGNMENT = 64
"""Tensors start at multiples of this many bytes: any dtype may be viewed there, and it is a cache line."""


def lay_out_together(parameters: Iterable[torch.nn.Parameter], bucket_bytes: int = BUCKET_BYTES) -> None:
    """Move parameters into buckets of adjacent memory, in their order; nothing else about them changes.

    What copies the weights (to generators, from a GPU) then copies a few large arrays and not hundreds of small ones.
    Needs the memory of one bucket while it works. A parameter larger than `bucket_bytes` stays where it is.
    """
    bucket: list[torch.nn.Parameter] = []
    end = 0
    for parameter in parameters:
        if end + parameter.nbytes > bucket_bytes or (bucket and parameter.device != bucket[0].device):
            _move(bucket, end)
            bucket, end = [], 0
        if parameter.nbytes <= bucket_bytes:
            bucket.append(parameter)
            end += _aligned(parameter.nbytes)
    _move(bucket, end)


def _move(parameters: list[torch.nn.Parameter], size: int) -> None:
    if not parameters:
        return
    flat = torch.zeros(size, dtype=torch.uint8, device=parameters[0].device)
    offset = 0
    for parameter in parameters:
        place = flat[offset : offset + parameter.nbytes].view(parameter.dtype).view(parameter.shape)
        parameter.data = place.copy_(parameter.data)
        offset += _aligned(parameter.nbytes)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
