"""Which judgements a run waits for, and which items people are asked about first."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from rayrlhf.labelling.agreement import alike
from rayrlhf.labelling.judgements import Item, Judgement


@dataclass(frozen=True)
class Wanted:
    """How many judgements are enough."""

    labellers: int
    """For each item. Who skips an item has judged it, too."""
    until: float
    """Share of the items that must have them, above 0."""
    settle: bool = False
    """Whether an item needs no more labellers once two have ranked it, and none disagree on a pair."""

    def done(self, judgements: Sequence[Judgement], items: Sequence[Item]) -> int:
        """How many items need nobody any more."""
        own = by_item(judgements)
        return sum(self._complete(own[item.id]) for item in items)

    def enough(self, done: int, items: int) -> bool:
        """Whether the run may go on."""
        return done >= self.until * items

    def reordered(self, judgements: Sequence[Judgement], items: Sequence[Item]) -> list[Item]:
        """The items whose priority changes, with their new one.

        The more the labellers of an item disagree, the sooner the next one is asked. An item that needs nobody comes
        after those that nobody has seen.
        """
        own = by_item(judgements)
        priorities = [-1.0 if self._complete(own[item.id]) else disagreement(own[item.id]) for item in items]
        return [
            replace(item, priority=priority)
            for item, priority in zip(items, priorities, strict=True)
            if item.priority != priority
        ]

    def _complete(self, own: Sequence[Judgement]) -> bool:
        rankings = [judgement for judgement in own if judgement.ranks is not None]
        settled = self.settle and len(rankings) > 1 and disagreement(own) == 0
        return settled or len(own) >= self.labellers


def disagreement(judgements: Sequence[Judgement]) -> float:
    """Share of the pairs of answers that two labellers order differently, of those that both order; 0 without any."""
    ranks = [judgement.ranks for judgement in judgements if judgement.ranks is not None]
    verdicts = np.concatenate([alike(a, b) for a, b in combinations(ranks, 2)] or [np.empty(0)])
    return float(1 - verdicts.mean()) if len(verdicts) else 0.0


def by_item(judgements: Sequence[Judgement]) -> defaultdict[str, list[Judgement]]:
    """The judgements of each item, without repeats."""
    found: defaultdict[str, list[Judgement]] = defaultdict(list)
    for judgement in judgements:
        if judgement.repeat == 0:
            found[judgement.item].append(judgement)
    return found
