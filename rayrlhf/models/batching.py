"""Rows of token ids cut into micro-batches, and laid out as tensors for one forward pass.

There are two layouts:

- Packed, if the model can (see `rayrlhf.models.attention`): all rows lie behind one another in one line, without
  padding. Rows with the same prompt share it: the prompt stands there once, each answer sees the prompt and itself,
  and its positions continue those of the prompt.
- Padded, for all other models: a rectangle with one row a line, padded on the right. It needs no attention mask. Under
  causal attention no real token sees the padding behind it, and positions count from 0, so the result is exact for
  every architecture. Rows are sorted by length before they are cut, which keeps the padding small.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from rayrlhf.data.rows import Row
from rayrlhf.models.attention import Piece


@dataclass(frozen=True)
class TokenBatch:
    """B rows in L lines of T tokens, with N predicted tokens in the order of the rows. A packed batch has one line.

    A forward pass gives hidden states [L, T, H]. Indices here are into their flat form, [L * T, H].
    """

    input_ids: Tensor
    """[L, T] int64"""
    states: Tensor
    """[N] int64 where the state is in which each predicted token was chosen: one position before the token"""
    targets: Tensor
    """[N] int64 ids of the predicted tokens"""
    ends: Tensor
    """[B] int64 where each row's last token is"""
    counts: list[int]
    """[B] predicted tokens of each row; `result.split(counts)` cuts a flat [N] result back into rows"""
    barred: Tensor
    """[M, 2] int64 what could not be drawn: the number of a predicted token, and an id that its softmax leaves out"""
    positions: Tensor | None = None
    """[1, T] int64 of a packed batch; None if they count from 0 in every line"""
    pieces: tuple[Piece, ...] = ()
    """which tokens of a packed batch attend to which, in order"""


def collate(rows: Sequence[Row], pad_token_id: int, device: torch.device | str = "cpu") -> TokenBatch:
    """Lay rows out as a rectangle, one row a line, padded on the right with `pad_token_id`."""
    longest = max(len(row.ids) for row in rows)
    ids = np.full((len(rows), longest), pad_token_id, np.int64)
    places = [i * longest + np.arange(len(row.ids)) for i, row in enumerate(rows)]
    return _token_batch(rows, places, ids, device)


def pack(rows: Sequence[Row], device: torch.device | str = "cpu", shares: Sequence[int] | None = None) -> TokenBatch:
    """Lay all rows behind one another in one line, without padding.

    Args:
        rows: in the order in which they will lie.
        device: of the tensors.
        shares: how many consecutive rows share a prompt, for one prompt after the other. `[2, 1]` means that the first
            two rows share theirs and the third has its own. None: no row shares anything.
    """
    counts = [1] * len(rows) if shares is None else shares
    places: list[NDArray[np.int64]] = []
    layout: list[tuple[int, list[int]]] = []
    end = 0
    remaining = iter(rows)
    for line in ([next(remaining) for _ in range(count)] for count in counts):
        shared = line[0].prompt if len(line) > 1 else 0  # a row by itself is one causal sequence
        prompt = np.arange(end, end + shared)
        end += shared
        own = [len(row.ids) - shared for row in line]  # what each row adds to the line
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
    """Cut rows into micro-batches; yields the indices of each one's rows, and the batch of them.

    Args:
        rows: in any order.
        max_tokens: of a batch, padding included. A row or group that is longer gets a batch of its own.
        pad_token_id: fills padded batches.
        device: of the tensors.
        packed: True packs rows and lets those with the same prompt share it; False pads them to a rectangle.
        groups: the group of each row. Rows of one group, which have the same prompt, stay in one batch and in order.
    """
    items: dict[Hashable, list[list[int]]] = {}
    for line in _lines(rows, max_tokens if packed else 0, groups):
        items.setdefault(line[0] if groups is None else groups[line[0]], []).append(line)

    def longest(item: list[list[int]]) -> int:
        return max(_length([rows[i] for i in line]) for line in item)

    # Rows of the same length come together: packed, they share one call of the attention; padded, they need no padding.
    laid = sorted(items.values(), key=longest, reverse=True)
    # `micro_batches` counts lines x longest line. A packed item has no padding: count each token as a line of length 1.
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

    For example, `micro_batches([(1, 9), (1, 7), (2, 4)], 20)` is `[[0, 1], [2]]`: two lines of 9 fit, four do not.

    Args:
        sizes: for each item, the number of its lines, which stay together, and the length of the longest of them. Items
            come in the order of falling length.
        max_tokens: an item that is larger gets a micro-batch of its own.

    Returns:
        The items' indices, each exactly once.
    """
    cut: list[list[int]] = []
    lines = longest = 0
    for i, (own, length) in enumerate(sizes):
        # Lengths fall, so the first item of a micro-batch has its longest line.
        if cut and (lines + own) * longest <= max_tokens:
            cut[-1].append(i)
            lines += own
        else:
            cut.append([i])
            lines, longest = own, length
    return cut


def _lines(rows: Sequence[Row], max_tokens: int, groups: Sequence[Hashable] | None) -> list[list[int]]:
    """Indices of rows that will share one prompt, in lines of at most `max_tokens`.

    With `max_tokens` 0, as for padded batches, each row is a line of its own.
    """
    lines: list[list[int]] = []
    filling: dict[Hashable, tuple[list[int], int]] = {}
    for i, row in enumerate(rows):
        key = (groups and groups[i], row.prompt_key)  # rows of two groups share nothing: they may go to two batches
        line, length = filling.get(key, ([], row.prompt))
        length += len(row.ids) - row.prompt
        if not line or not row.prompt or length > max_tokens:
            line, length = [], len(row.ids)
            lines.append(line)
        line.append(i)
        filling[key] = line, length
    return lines


def _length(line: Sequence[Row]) -> int:
    """Tokens of rows that share their prompt, which counts once."""
    return line[0].prompt + sum(len(row.ids) - row.prompt for row in line)


def _token_batch(
    rows: Sequence[Row], places: Sequence[NDArray[np.int64]], ids: NDArray[np.int64], device: torch.device | str
) -> TokenBatch:
    """The batch of rows whose tokens lie at `places` of the flat `ids` [L, T]; fills `ids` in."""
    predicted = [np.flatnonzero(row.mask) for row in rows]
    counts = [len(each) for each in predicted]
    starts = np.cumsum(counts) - counts
    for row, place in zip(rows, places, strict=True):
        ids.flat[place] = row.ids

    def tensor(values: ArrayLike) -> Tensor:
        return torch.from_numpy(np.asarray(values)).to(device)

    return TokenBatch(
        tensor(ids),
        tensor(np.concatenate([place[each - 1] for place, each in zip(places, predicted, strict=True)])),
        tensor(np.concatenate([row.ids[each] for row, each in zip(rows, predicted, strict=True)])),
        tensor([place[-1] for place in places]),
        counts,
        tensor(np.concatenate([row.barred + np.array([start, 0]) for row, start in zip(rows, starts, strict=True)])),
    )


def _pieces(layout: Sequence[tuple[int, list[int]]], device: torch.device | str) -> tuple[Piece, ...]:
    """Which tokens attend to which.

    Args:
        layout: for each line, the length of the shared prompt and those of its answers; a prompt of length 0 is
            followed by one row that shares nothing.
        device: of the masks.
    """
    pieces: list[Piece] = []
    for prompt, answers in layout:
        if prompt:
            pieces.append(Piece(1, prompt))
            # The attention of several answers at once computes also what the mask then hides: every answer's view of
            # the others. At most a prompt's length of answers a time keeps that below what is needed anyhow.
            for some in micro_batches([(length, 1) for length in answers], prompt):
                lengths = [answers[i] for i in some]
                pieces.append(Piece(1, sum(lengths), _visible(prompt, lengths).to(device)))
        # A row as long as the one before it joins its piece: one call of the attention for all of them.
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
