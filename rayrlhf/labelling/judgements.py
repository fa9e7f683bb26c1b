"""The judgement of one person on the answers to one prompt, and the item that was judged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


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


def dense(ranks: Sequence[float]) -> tuple[int, ...]:
    """[K] ranks without gaps: 1 is best, equal values stay equal, and lower values come first."""
    places = {value: place for place, value in enumerate(sorted(set(ranks)), start=1)}
    return tuple(places[value] for value in ranks)
