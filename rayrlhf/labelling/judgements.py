"""The judgement of one person on the answers to one prompt, and the item that was judged."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Item:
    """The answers to one prompt that people rank."""

    id: str
    """Of the prompt, as in `to_rank.jsonl`."""
    prompt: str
    answers: tuple[str, ...]
    """[K]"""
    priority: float = 0.0
    """Items of a higher one are asked first."""
    gold: tuple[int, ...] | None = None
    """[K] known ranks, by which labellers are checked; None: not a gold item."""


@dataclass(frozen=True)
class Judgement:
    """What one labeller said of one item."""

    item: str
    """Id of the prompt, as in `to_rank.jsonl`."""
    labeller: str
    ranks: tuple[int, ...] | None
    """[K] rank of each answer in the order of `to_rank.jsonl`; 1 is best, equal ranks are a tie. None: skipped."""
    skipped: str = ""
    """The reason, where it was skipped."""
    flags: tuple[str, ...] = ()
    ratings: tuple[int | None, ...] | None = None
    """[K] from 1 to 7."""
    note: str = ""
    shown: tuple[int, ...] = ()
    """[K] indices of the answers in the order in which they were shown."""
    seconds: float = 0.0
    """From the first look to the answer."""
    at: float = 0.0
    """Unix time."""
    repeat: int = 0
    """0: the first time that this labeller saw the item; 1: a repeat, which measures self-consistency."""
    compared: tuple[str, ...] = ()
    """Of the pairs mode, each verdict in the order of asking: `2>0`, answer 2 is better than answer 0; or `1=3`. The
    ranks follow from these. Empty where all answers were shown at once."""

    def saw_together(self, one: int, other: int) -> bool:
        """Whether the labeller compared these two answers, and their order does not only follow from other verdicts."""
        return not self.compared or any({*map(int, re.split("[>=]", each))} == {one, other} for each in self.compared)


def dense(ranks: Sequence[float]) -> tuple[int, ...]:
    """[K] ranks without gaps: 1 is best, equal values stay equal, and lower values come first."""
    places = {value: place for place, value in enumerate(sorted(set(ranks)), start=1)}
    return tuple(places[value] for value in ranks)


def grouped(ranks: Sequence[float]) -> list[int | list[int]]:
    """Ranks of answers as the answers in their order, those of one rank in a list.

    Example: the ranks (2, 2, 1) are [2, [0, 1]].
    """
    order = sorted(range(len(ranks)), key=lambda index: ranks[index])
    groups = [list(group) for _, group in itertools.groupby(order, key=lambda index: ranks[index])]
    return [group[0] if len(group) == 1 else group for group in groups]


def ungrouped(ranking: Any, count: int) -> tuple[int, ...] | None:
    """[K] ranks of the answers; None if this is no ranking of `count` answers. The inverse of `grouped`."""
    if not isinstance(ranking, list):
        return None
    groups = [group if isinstance(group, list) else [group] for group in ranking]
    places = {}
    for place, group in enumerate(groups, start=1):
        for index in group:
            # type(...) is int: isinstance would take true and false for 1 and 0.
            if type(index) is not int or index in places:
                return None
            places[index] = place
    return tuple(places[index] for index in range(count)) if set(places) == set(range(count)) else None
