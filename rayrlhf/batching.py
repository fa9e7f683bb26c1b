"""Rows of token ids, and how they are cut into shards and micro-batches and laid out for one forward pass.

A batch is a rectangle of lines, padded on the right. A line is one row; or, where the model can (see
`rayrlhf.logprobs.shares_prompts`) and it pays, a prompt and answers to it: each answer sees the prompt and itself,
and its positions go on from the prompt's, so that the prompt is computed once and nothing else changes.

Lines of one row need no attention mask: under causal attention no real token can see the padding behind it, and
positions count from 0 by themselves, so that layout is exact for every architecture. Sorting by length before cutting
keeps the padding small.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

ATTENTION = 1024
"""Length of a line whose masked attention costs about as much as everything else that is computed of it.

Measured with a hidden size of 256; larger models have a larger one, so that this asks for lines that are too short
rather than too long there.
"""


@dataclass(frozen=True)
class Row:
    """One sequence. `mask[t]` says that token t is predicted (trained on, or scored); `mask[0]` is False."""

    ids: NDArray[np.int64]
    """[T]"""
    mask: NDArray[np.bool_]
    """[T]"""
    prompt: int = 0
    """Leading tokens that rows with equal ones may share, none of them predicted; 0 shares nothing."""

    @classmethod
    def completion(
        cls, prompt_ids: Sequence[int] | NDArray[np.int64], response_ids: Sequence[int] | NDArray[np.int64]
    ) -> Row:
        """A prompt followed by the response whose tokens count."""
        ids = np.concatenate([np.asarray(prompt_ids, np.int64), np.asarray(response_ids, np.int64)])
        mask = np.arange(len(ids)) >= max(1, len(prompt_ids))
        return cls(ids, mask, len(prompt_ids))

    @property
    def prompt_key(self) -> bytes:
        """Equal for rows that may share their prompt."""
        return self.ids[: self.prompt].tobytes()


@dataclass(frozen=True)
class TokenBatch:
    """B rows in L lines of T tokens; N predicted tokens, in the order of the rows.

    States of a forward pass, [L, T, H], are addressed flat, as [L * T, H].
    """

    input_ids: Tensor
    """[L, T] int64"""
    states: Tensor
    """[N] int64 where the state is that each predicted token was chosen in: one position before it"""
    targets: Tensor
    """[N] int64 ids of the predicted tokens"""
    ends: Tensor
    """[B] int64 where each row's last token is"""
    counts: list[int]
    """[B] predicted tokens of each row: how a flat [N] result splits back into rows"""
    positions: Tensor | None
    """[L, T] int64; None where no prompt is shared: they count from 0"""
    segments: Tensor | None
    """[L, T] int64: 0 is a line's prompt, its answers count from 1, padding is -1; None where no prompt is shared"""

    def visible(self) -> Tensor | None:
        """[L, 1, T, T] bool: which keys each query sees; None for plain causal attention."""
        if self.segments is None:
            return None
        keys, queries = self.segments[:, None, None, :], self.segments[:, None, :, None]
        return ((keys == 0) | (keys == queries)).tril()


def collate(
    rows: Sequence[Row], pad_token_id: int, device: torch.device | str = "cpu", lines: Sequence[int] | None = None
) -> TokenBatch:
    """Lay rows out, padded on the right.

    Args:
        lines: how many consecutive rows share each line; they have equal prompts. None gives every row its own.
    """
    counts = [1] * len(rows) if lines is None else lines
    remaining = iter(rows)
    members = [[next(remaining) for _ in range(count)] for count in counts]
    longest = max(_length(line) for line in members)
    ids = np.full((len(members), longest), pad_token_id, np.int64)
    positions = np.zeros_like(ids)  # also of padding: a line may be longer than the model's context, a row may not
    segments = np.full((len(members), longest), -1)
    states, targets, ends = [], [], []
    for i, line in enumerate(members):
        shared = line[0].prompt if len(line) > 1 else 0
        ids[i, :shared], segments[i, :shared], positions[i, :shared] = line[0].ids[:shared], 0, np.arange(shared)
        start = shared
        for segment, row in enumerate(line, start=1):
            end = start + len(row.ids) - shared
            ids[i, start:end], segments[i, start:end] = row.ids[shared:], segment
            positions[i, start:end] = np.arange(shared, len(row.ids))
            # Where each of the row's tokens stands in the rectangle: the prompt's are those of the line.
            places = i * longest + np.concatenate([np.arange(shared), np.arange(start, end)])
            predicted = np.flatnonzero(row.mask)
            states.append(places[predicted - 1])
            targets.append(row.ids[predicted])
            ends.append(places[-1])
            start = end
    sharing = max(counts) > 1

    def tensor(values: ArrayLike) -> Tensor:
        return torch.from_numpy(np.asarray(values)).to(device)

    return TokenBatch(
        tensor(ids),
        tensor(np.concatenate(states)),
        tensor(np.concatenate(targets)),
        tensor(ends),
        [len(each) for each in targets],
        tensor(positions) if sharing else None,
        tensor(segments) if sharing else None,
    )


def token_batches(
    rows: Sequence[Row],
    max_tokens: int,
    pad_token_id: int,
    device: torch.device | str,
    *,
    share: bool,
    groups: Sequence[Hashable] | None = None,
) -> Iterator[tuple[list[int], TokenBatch]]:
    """Cut rows into micro-batches of at most `max_tokens`; yields the indices of their rows, and the batch of them.

    Args:
        share: rows with the same prompt stand in one line, as long as that pays and is within `max_tokens`.
        groups: what each row belongs to: rows of one group, which have the same prompt, stay in one batch and in order.
    """
    items: dict[Hashable, list[list[int]]] = {}
    for line in _lines(rows, max_tokens if share else 0, groups):
        items.setdefault(line[0] if groups is None else groups[line[0]], []).append(line)
    laid = list(items.values())
    sizes = [(len(item), max(_length([rows[i] for i in line]) for line in item)) for item in laid]
    for piece in micro_batches(sizes, max_tokens):
        lines = [line for each in piece for line in laid[each]]
        indices = [i for line in lines for i in line]
        yield indices, collate([rows[i] for i in indices], pad_token_id, device, [len(line) for line in lines])


def micro_batches(sizes: Sequence[tuple[int, int]], max_tokens: int) -> list[list[int]]:
    """Cut items into micro-batches of at most `max_tokens` padded tokens (lines x longest line).

    An item that is larger gets a micro-batch of its own. Every index appears exactly once.

    Args:
        sizes: of each item its lines, which stay together, and the length of its longest.
    """
    cut: list[list[int]] = []
    lines = longest = 0
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i][1]):
        own, length = sizes[i]
        # Sorted by falling length: the first item of a micro-batch has its longest line.
        if cut and (lines + own) * longest <= max_tokens:
            cut[-1].append(i)
            lines += own
        else:
            cut.append([i])
            lines, longest = own, length
    return cut


def shard(lengths: Sequence[int], world: int, groups: Sequence[Hashable] | None = None) -> list[list[int]]:
    """Deal rows to `world` ranks so that their token counts are balanced (longest first, to the least loaded).

    A pure function of its arguments: every rank computes the same deal without talking to the others.

    Args:
        lengths: tokens of each row.
        groups: what each row belongs to: rows of one group go to one rank, if there are enough groups for all.
    """
    members: dict[Hashable, list[int]] = {}
    for i, group in enumerate(range(len(lengths)) if groups is None else groups):
        members.setdefault(group, []).append(i)
    items = list(members.values()) if len(members) >= world else [[i] for i in range(len(lengths))]
    load = [0] * world
    dealt: list[list[int]] = [[] for _ in range(world)]
    for item in sorted(items, key=lambda item: (-sum(lengths[i] for i in item), item[0])):
        rank = min(range(world), key=lambda r: (load[r], len(dealt[r]), r))
        dealt[rank] += item
        load[rank] += sum(lengths[i] for i in item)
    return [sorted(rows) for rows in dealt]


def _lines(rows: Sequence[Row], max_tokens: int, groups: Sequence[Hashable] | None) -> list[list[int]]:
    """Indices of the rows of each line.

    An answer of R tokens, one of m to a prompt of P, costs P / m + R tokens, and attention over (P + m R)^2 / m pairs
    of them, at 1 / `ATTENTION` of a token each. That is least where the answers have m R = sqrt(P (P + ATTENTION))
    tokens: a line takes no more than that.
    """
    lines: list[list[int]] = []
    filling: dict[Hashable, tuple[list[int], int]] = {}
    for i, row in enumerate(rows):
        key = (groups and groups[i], row.prompt_key)
        line, length = filling.get(key, ([], row.prompt))
        length += len(row.ids) - row.prompt
        if not line or length > min(max_tokens, row.prompt + (row.prompt * (row.prompt + ATTENTION)) ** 0.5):
            line, length = [], len(row.ids)
            lines.append(line)
        line.append(i)
        filling[key] = line, length
    return lines


def _length(line: Sequence[Row]) -> int:
    """Tokens of rows that share one line."""
    return line[0].prompt + sum(len(row.ids) - row.prompt for row in line)
