"""The place of a model's parameters in memory."""

from __future__ import annotations

from collections.abc import Iterable

import torch

BUCKET_BYTES = 256 * 2**20
ALIGNMENT = 64
"""Parameters start at multiples of this many bytes: the size of a cache line, and enough for any dtype."""


def lay_out_together(parameters: Iterable[torch.nn.Parameter], bucket_bytes: int = BUCKET_BYTES) -> None:
    """Move parameters into buckets of adjacent memory, in their order; nothing else about them changes.

    Copying all weights, to generators or from a GPU, then takes a few large copies in place of hundreds of small ones.
    Moving needs additional memory of one bucket.

    Args:
        parameters: plain tensors. Those of a sharded model (DTensors) have no memory of their own to be moved.
        bucket_bytes: size of a bucket. A larger parameter stays where it is.
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
        # `.data`: the parameter stays the same object, so that optimiser and tied modules keep it.
        place = flat[offset : offset + parameter.nbytes].view(parameter.dtype).view(parameter.shape)
        parameter.data = place.copy_(parameter.data)
        offset += _aligned(parameter.nbytes)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
