"""The tokens of a corpus, and the windows of them that a model is trained on."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

EOS, IGNORED = 2, -100
"""The token that stands before every post, and the target of a position that has none."""


@dataclass(frozen=True)
class Corpus:
    """Token ids of many posts."""

    ids: NDArray[np.uint16]
    """[N] of all posts, one after the other, without special tokens."""
    starts: NDArray[np.int64]
    """[posts + 1] where each begins in `ids`, and where the last one ends."""

    @classmethod
    def read(cls, path: Path) -> Corpus:
        with np.load(path) as stored:
            return cls(stored["ids"], stored["starts"])

    def split(self, last: int) -> tuple[Corpus, Corpus]:
        """All posts but the last ones, and the last ones."""
        return Corpus(self.ids, self.starts[: len(self.starts) - last]), Corpus(self.ids, self.starts[-last - 1 :])

    def windows(self, length: int, seed: str) -> list[list[tuple[int, int]]]:
        """All posts in windows, as ranges of `ids`, in an order that the seed decides.

        A window has room for `length` + 1 tokens, since the last one is only predicted. An EOS stands before each
        range. Only posts that are longer than a window are cut. The others go, longest first, where they leave the
        least room (best-fit packing; Ding et al. 2024, Fewer Truncations Improve Language Modeling).
        """
        chance = random.Random(seed)
        pieces = [
            (begin, min(begin + length, end))
            for start, end in zip(self.starts[:-1].tolist(), self.starts[1:].tolist(), strict=True)
            for begin in range(start, end, length)
        ]
        chance.shuffle(pieces)
        pieces.sort(key=lambda piece: piece[0] - piece[1])  # stable: equally long ones stay shuffled
        packed: list[list[tuple[int, int]]] = []
        by_room: list[list[int]] = [[] for _ in range(length + 2)]
        rooms = 0  # bit r is set where a window has room for r more tokens
        for begin, end in pieces:
            size = end - begin + 1
            fitting = rooms >> size
            if fitting:
                room = size + (fitting & -fitting).bit_length() - 1
                window = by_room[room].pop()
                if not by_room[room]:
                    rooms ^= 1 << room
            else:
                room, window = length + 1, len(packed)
                packed.append([])
            packed[window].append((begin, end))
            by_room[room - size].append(window)
            rooms |= 1 << (room - size)
        chance.shuffle(packed)
        return packed

    def batch(self, windows: Sequence[Sequence[tuple[int, int]]], length: int) -> tuple[Tensor, Tensor]:
        """Inputs [B, length] and targets [B, length] of windows. What is left of a window has the target IGNORED."""
        tokens = np.full((len(windows), length + 1), EOS, np.int64)
        targets = np.full((len(windows), length + 1), IGNORED, np.int64)
        for row, window in enumerate(windows):
            at = 0
            for begin, end in window:
                tokens[row, at + 1 : at + 1 + end - begin] = self.ids[begin:end]
                at += 1 + end - begin
            targets[row, : at + 1] = tokens[row, : at + 1]  # one EOS more, where there is room: the last post ends
        return torch.from_numpy(tokens[:, :-1]), torch.from_numpy(targets[:, 1:])
