"""Rows of token ids, and how they are cut into shards and micro-batches.

Rows are padded on the right and passed without an attention mask: under causal attention no real token can see
the padding behind it, and positions count from 0 by themselves, so one layout is exact for every architecture.
Sorting by length before cutting keeps the padding small.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray


@dataclass(frozen=True)
class Row:
    """One sequence. `mask[t]` says that token t is predicted (trained on, or scored); `mask[0]` is False."""

    ids: NDArray[np.int64]
    """[T]"""
    mask: NDArray[np.bool_]
    """[T]"""

    @classmethod
    def completion(
        cls, prompt_ids: Sequence[int] | NDArray[np.int64], response_ids: Sequence[int] | NDArray[np.int64]
    ) -> Row:
        """A prompt followed by the response whose tokens count."""
        ids = np.concatenate([np.asarray(prompt_ids, np.int64), np.asarray(response_ids, np.int64)])
        mask = np.arange(len(ids)) >= max(1, len(prompt_ids))
        return cls(ids, mask)


@dataclass(frozen=True)
class TokenBatch:
    """B rows padded on the right to T tokens; N = mask.sum() predicted tokens, in row-major order."""

    input_ids: torch.Tensor
    """[B, T] int64"""
    mask: torch.Tensor
    """[B, T] bool"""
    lengths: torch.Tensor
    """[B] int64, tokens of each row without padding"""

    @property
    def counts(self) -> list[int]:
        """Predicted tokens of each row: how a flat [N] result splits back into rows."""
        return [int(n) for n in self.mask.sum(1)]


def collate(rows: Sequence[Row], pad_token_id: int, device: torch.device | str = "cpu") -> TokenBatch:
    """Pad rows on the right into one batch."""
    longest = max(len(row.ids) for row in rows)
    ids = np.full((len(rows), longest), pad_token_id, np.int64)
    mask = np.zeros((len(rows), longest), np.bool_)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = row.ids
        mask[i, : len(row.ids)] = row.mask
    lengths = torch.tensor([len(row.ids) for row in rows])
    return TokenBatch(torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device), lengths.to(device))


def micro_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Cut rows into micro-batches of at most `max_tokens` padded tokens (rows x longest row).

    A row longer than `max_tokens` gets a micro-batch of its own. Every index appears exactly once.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    cut: list[list[int]] = []
    for i in order:
        # Sorted by falling length: the first row of a micro-batch is its longest.
        if cut and (len(cut[-1]) + 1) * lengths[cut[-1][0]] <= max_tokens:
            cut[-1].append(i)
        else:
            cut.append([i])
    return cut


def shard(lengths: Sequence[int], world: int) -> list[list[int]]:
    """Deal rows to `world` ranks so that their token counts are balanced (longest first, to the least loaded).

    A pure function of the lengths: every rank computes the same deal without talking to the others.
    """
    load = [0] * world
    dealt: list[list[int]] = [[] for _ in range(world)]
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        rank = min(range(world), key=lambda r: (load[r], len(dealt[r]), r))
        dealt[rank].append(i)
        load[rank] += lengths[i]
    return [sorted(rows) for rows in dealt]
