"""Rows of token ids, and how they are shared out to ranks and actors.

No torch here: the coordinator, which shares rows out and computes nothing, does without it.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from rayrlhf.trajectory import Trajectory


@dataclass(frozen=True)
class Row:
    """One sequence of T tokens."""

    ids: NDArray[np.int64]
    """[T] token ids"""
    mask: NDArray[np.bool_]
    """[T] whether token t is predicted, that is trained on or given a log-prob; False for the first token, which
    nothing precedes"""
    prompt: int = 0
    """how many leading tokens a row may share with others that start with the same ones; none of them is predicted"""
    barred: NDArray[np.int64] = field(default_factory=lambda: np.empty((0, 2), np.int64))
    """[M, 2] what could not be drawn: a predicted token, counted from 0, and a token id that was left out of its
    softmax"""

    @classmethod
    def completion(
        cls, prompt_ids: Sequence[int] | NDArray[np.int64], response_ids: Sequence[int] | NDArray[np.int64]
    ) -> Row:
        """A prompt and its response, of which the response's tokens are predicted."""
        ids = np.concatenate([np.asarray(prompt_ids, np.int64), np.asarray(response_ids, np.int64)])
        mask = np.arange(len(ids)) >= max(1, len(prompt_ids))  # also without a prompt the first token has no log-prob
        return cls(ids, mask, len(prompt_ids))

    @classmethod
    def of(cls, trajectory: Trajectory) -> Row:
        """A trajectory, of which the tokens that the policy wrote are predicted."""
        row = cls.completion(trajectory.prompt_ids, trajectory.response_ids)
        if trajectory.written is not None:
            mask = np.concatenate([np.zeros(len(trajectory.prompt_ids), np.bool_), trajectory.written])
            row = replace(row, mask=mask)
        if trajectory.minimum is None:
            return row
        early = np.flatnonzero(trajectory.minimum.holds(row.ids[row.mask]))
        ends = np.asarray(trajectory.minimum.ends, np.int64)
        return replace(row, barred=np.stack([early.repeat(len(ends)), np.tile(ends, len(early))], axis=1))

    @property
    def prompt_key(self) -> bytes:
        """The same for all rows that may share their prompt."""
        return self.ids[: self.prompt].tobytes()


def shard(lengths: Sequence[int], world: int, groups: Sequence[Hashable] | None = None) -> list[list[int]]:
    """Deal rows to ranks so that all have about as many tokens: the longest first, each to the rank with the fewest.

    A pure function of its arguments: every rank computes the same deal without talking to the others.

    Args:
        lengths: tokens of each row.
        world: number of ranks.
        groups: the group of each row. Rows of one group go to one rank, unless there are fewer groups than ranks.

    Returns:
        For each rank the indices of its rows, rising; empty if there are fewer rows than ranks.
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
