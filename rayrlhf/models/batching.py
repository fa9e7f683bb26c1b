"""Rows of token ids, and how they are cut into shards and micro-batches and laid out for one forward pass.

A batch is packed where the model can (see `rayrlhf.models.attention`): all rows lie behind one another in one line,
without padding, and rows with equal prompts have it in common: it stands there once, each answer sees the prompt and
itself, and its positions go on from the prompt's. Nothing else changes; cost grows with the tokens that are there.

Elsewhere a batch is a rectangle of rows, padded on the right. It needs no attention mask: under causal attention no
real token can see the padding behind it, and positions count from 0 by themselves, so that it is exact for every
architecture. Sorting by length before cutting keeps the padding small.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from rayrlhf.models.attention import Piece


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
    """B rows in L lines of T tokens (a packed batch has one line); N predicted tokens, in the order of the rows.

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
    positions: Tensor | None = None
    """[1, T] int64 of a packed batch; None where they count from 0 in every line"""
    pieces: tuple[Piece, ...] = ()
    """Of a packed batch, in order: what attends to what."""


def collate(rows: Sequence[Row], pad_token_id: int, device: torch.device | str = "cpu") -> TokenBatch:
    """One line a row, padded on the right."""
    longest = max(len(row.ids) for row in rows)
    ids = np.full((len(rows), longest), pad_token_id, np.int64)
    places = [i * longest + np.arange(len(row.ids)) for i, row in enumerate(rows)]
    return _token_batch(rows, places, ids, device)


def pack(rows: Sequence[Row], device: torch.device | str = "cpu", shares: Sequence[int] | None = None) -> TokenBatch:
    """All rows behind one another in one line, without padding.

    Args:
        shares: how many consecutive rows share each prompt, which they have in common. None: none does.
    """
    counts = [1] * len(rows) if shares is None else shares
    places: list[NDArray[np.int64]] = []
    layout: list[tuple[int, list[int]]] = []
    end = 0
    remaining = iter(rows)
    for line in ([next(remaining) for _ in range(count)] for count in counts):
        shared = line[0].prompt if len(line) > 1 else 0
        prompt = np.arange(end, end + shared)
        end += shared
        own = [len(row.ids) - shared for row in line]
        for length in own:
            places.append(np.concatenate([prompt, np.arange(end, end + length)]))
            end += length
        layout.append((shared, own))
    batch = _token_batch(rows, places, np.empty((1, end), np.int64), device)
    positions = np.empty((1, end), np.int64)
    for each in places:
        positions[0, each] = np.arange(len(each))
    return replace(batch, positions=torch.from_numpy(positions).to(device), pieces=_pieces(layout, device))


def token_batches(
    rows: Sequence[Row],
    max_tokens: int,
    pad_token_id: int,
    device: torch.device | str,
    *,
    packed: bool,
    groups: Sequence[Hashable] | None = None,
) -> Iterator[tuple[list[int], TokenBatch]]:
    """Cut rows into micro-batches of at most `max_tokens`; yields the indices of their rows, and the batch of them.

    Args:
        packed: rows are packed, and those with the same prompt share it; else padded to a rectangle.
        groups: what each row belongs to: rows of one group, which have the same prompt, stay in one batch and in order.
    """
    items: dict[Hashable, list[list[int]]] = {}
    for line in _lines(rows, max_tokens if packed else 0, groups):
        items.setdefault(line[0] if groups is None else groups[line[0]], []).append(line)

    def longest(item: list[list[int]]) -> int:
        return max(_length([rows[i] for i in line]) for line in item)

    # Equally long rows stand together: one attention for all of them, or no padding between them.
    laid = sorted(items.values(), key=longest, reverse=True)
    # Packed, an item is as many lines of one token.
    sizes = [(sum(_length([rows[i] for i in line]) for line in item), 1) if packed else (len(item), longest(item))
             for item in laid]  # fmt: skip
    for piece in micro_batches(sizes, max_tokens):
        lines = [line for each in piece for line in laid[each]]
        indices = [i for line in lines for i in line]
        chosen = [rows[i] for i in indices]
        shares = [len(line) for line in lines]
        yield indices, pack(chosen, device, shares) if packed else collate(chosen, pad_token_id, device)


def micro_batches(sizes: Sequence[tuple[int, int]], max_tokens: int) -> list[list[int]]:
    """Cut items into micro-batches of at most `max_tokens` tokens, padding included (lines x longest line).

    An item that is larger gets a micro-batch of its own. Every index appears exactly once.

    Args:
        sizes: of each item its lines, which stay together, and the length of its longest, which does not rise.
    """
    cut: list[list[int]] = []
    lines = longest = 0
    for i, (own, length) in enumerate(sizes):
        # The first item of a micro-batch has its longest line.
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
    """Indices of the rows that have one prompt in common, in lines of at most `max_tokens`."""
    lines: list[list[int]] = []
    filling: dict[Hashable, tuple[list[int], int]] = {}
    for i, row in enumerate(rows):
        key = (groups and groups[i], row.prompt_key)
        line, length = filling.get(key, ([], row.prompt))
        length += len(row.ids) - row.prompt
        if not line or not row.prompt or length > max_tokens:
            line, length = [], len(row.ids)
            lines.append(line)
        line.append(i)
        filling[key] = line, length
    return lines


def _length(line: Sequence[Row]) -> int:
    """Tokens of rows that share their prompt."""
    return line[0].prompt + sum(len(row.ids) - row.prompt for row in line)


def _token_batch(
    rows: Sequence[Row], places: Sequence[NDArray[np.int64]], ids: NDArray[np.int64], device: torch.device | str
) -> TokenBatch:
    """The batch of rows whose tokens belong to these `places` of the flat `ids` [L, T], which are filled in."""
    predicted = [np.flatnonzero(row.mask) for row in rows]
    for row, place in zip(rows, places, strict=True):
        ids.flat[place] = row.ids

    def tensor(values: ArrayLike) -> Tensor:
        return torch.from_numpy(np.asarray(values)).to(device)

    return TokenBatch(
        tensor(ids),
        tensor(np.concatenate([place[each - 1] for place, each in zip(places, predicted, strict=True)])),
        tensor(np.concatenate([row.ids[each] for row, each in zip(rows, predicted, strict=True)])),
        tensor([place[-1] for place in places]),
        [len(each) for each in predicted],
    )


def _pieces(layout: Sequence[tuple[int, list[int]]], device: torch.device | str) -> tuple[Piece, ...]:
    """What attends to what, where each prompt is followed by answers of these lengths; one of length 0 by one row."""
    pieces: list[Piece] = []
    for prompt, answers in layout:
        if prompt:
            pieces.append(Piece(1, prompt))
            # Answers that are attended to together hide from each other what was computed: no more than the prompt is.
            for some in micro_batches([(length, 1) for length in answers], prompt):
                lengths = [answers[i] for i in some]
                pieces.append(Piece(1, sum(lengths), _visible(prompt, lengths).to(device)))
        elif pieces and pieces[-1].mask is None and pieces[-1].length == answers[0]:
            pieces[-1] = pieces[-1]._replace(sequences=pieces[-1].sequences + 1)
        else:
            pieces.append(Piece(1, answers[0]))
    return tuple(pieces)


def _visible(prompt: int, answers: Sequence[int]) -> Tensor:
    """[R, prompt + R] bool for answers of R tokens together: each sees the prompt and itself, up to the token."""
    answer = torch.arange(len(answers)).repeat_interleave(torch.tensor(answers))
    own = (answer[:, None] == answer).tril()
    return torch.cat([own.new_ones(len(answer), prompt), own], dim=1)
