"""Which judgements a run waits for, which items people are asked about first, and how far they are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from rayrlhf.labelling.agreement import alike
from rayrlhf.labelling.database import LabelDatabase
from rayrlhf.labelling.judgements import Item, Judgement


@dataclass(frozen=True)
class Wanted:
    """How many judgements are enough."""

    labellers: int
    """For each item. Who skips an item has judged it, too."""
    until: float
    """Share of the items that must have them, above 0."""
    settle: bool = False
    """Whether an item needs no more labellers once two have ranked it, and none disagree on a pair. Then the more the
    labellers of an item disagree, the sooner the next one is asked."""

    def enough(self, done: int, items: int) -> bool:
        """Whether the run may go on when so many of the items need nobody any more."""
        return done >= self.until * items

    def complete(self, own: Sequence[Judgement]) -> bool:
        """Whether an item with these judgements, without repeats, needs nobody any more."""
        rankings = [judgement for judgement in own if judgement.ranks is not None]
        settled = self.settle and len(rankings) > 1 and disagreement(own) == 0
        return settled or len(own) >= self.labellers

    def priority(self, own: Sequence[Judgement]) -> float:
        """Of an item with these judgements. One that needs nobody comes after those that nobody has seen."""
        return -1.0 if self.complete(own) else disagreement(own)


class Progress:
    """The judgements of some items while people write more. A look reads what was written since the one before."""

    def __init__(self, database: LabelDatabase, wanted: Wanted, items: Sequence[Item]) -> None:
        self._database, self._wanted = database, wanted
        self._version: int | None = None
        self._priorities = {item.id: item.priority for item in items}
        self._last = self._rows = 0
        self._newest: dict[str, dict[tuple[str, int], tuple[int, Judgement]]] = defaultdict(dict)
        self._done: set[str] = set()

    @property
    def done(self) -> int:
        """How many of the items need nobody any more."""
        return len(self._done)

    @property
    def judgements(self) -> list[Judgement]:
        """Of the items: the newest of each labeller and repeat, without those that were undone, as written."""
        rows = {seq: judgement for own in self._newest.values() for seq, judgement in own.values()}
        return [rows[seq] for seq in sorted(rows)]

    @property
    def items(self) -> list[Item]:
        """The items, with the gold ranks that they have by now."""
        return [item for item in self._database.items() if item.id in self._priorities]

    def look(self) -> None:
        """Read what is new. Where the wanted number of labellers follows from what they say, priorities change."""
        version = self._database.version()  # before the rest: what is written after it is looked at again
        if version == self._version:
            return
        self._version, changed = version, set[str]()
        if self._database.written(self._last) != self._rows:  # somebody was forgotten: rows are gone
            changed = {*self._newest}
            self._newest.clear()
            self._last = self._rows = 0
        for seq, undone, judgement in self._database.rows_after(self._last):
            self._last, self._rows = seq, self._rows + 1
            if judgement.item in self._priorities:
                changed.add(judgement.item)
                place = (judgement.labeller, judgement.repeat)
                self._newest[judgement.item].pop(place, None)
                if not undone:
                    self._newest[judgement.item][place] = (seq, judgement)
        priorities = {}
        for item in changed:
            own = [judgement for _, judgement in self._newest[item].values() if judgement.repeat == 0]
            (self._done.add if self._wanted.complete(own) else self._done.discard)(item)
            priorities[item] = self._wanted.priority(own)
        if self._wanted.settle:
            changes = {item: priority for item, priority in priorities.items() if self._priorities[item] != priority}
            self._database.prioritize(changes)
            self._priorities |= changes


def disagreement(judgements: Sequence[Judgement]) -> float:
    """Share of the pairs of answers that two labellers order differently, of those that both order; 0 without any."""
    ranks = [judgement.ranks for judgement in judgements if judgement.ranks is not None]
    verdicts = np.concatenate([alike(a, b) for a, b in combinations(ranks, 2)] or [np.empty(0)])
    return float(1 - verdicts.mean()) if len(verdicts) else 0.0
