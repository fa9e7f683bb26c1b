"""What the admin sees: progress, agreement, and each labeller's figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rayrlhf.labelling.agreement import PUBLISHED, Agreement, agreement
from rayrlhf.labelling.database import LabelDatabase, spread
from rayrlhf.labelling.judgements import Judgement


class Overview:
    """The figures of the admin's page. They are computed again when a judgement has come in since."""

    def __init__(self, database: LabelDatabase) -> None:
        self._database = database
        self._written = -1
        self._agreement: Agreement | None = None

    def figures(self) -> dict[str, Any]:
        """What the template shows, by name."""
        written, items, judgements = self._database.written(), self._database.items(), self._database.judgements()
        if self._agreement is None or written != self._written:
            self._agreement, self._written = agreement(judgements, items), written
        return {
            "spread": spread(self._database.progress()),
            "items": len(items),
            "judgements": judgements,
            "agreement": self._agreement,
            "published": PUBLISHED,
            "first": first_places(judgements),
            "last": {judgement.labeller: judgement.at for judgement in judgements},
        }


def first_places(judgements: Sequence[Judgement]) -> list[float]:
    """By place of showing: the share of the rankings in which the answer there is best; a tie at the top is shared.

    Without a position bias, items with equally many answers give equal shares.
    """
    ranked = [judgement for judgement in judgements if judgement.ranks is not None]
    totals = [0.0] * max((len(judgement.shown) for judgement in ranked), default=0)
    for judgement in ranked:
        assert judgement.ranks is not None
        best = [place for place, index in enumerate(judgement.shown) if judgement.ranks[index] == 1]
        for place in best:
            totals[place] += 1 / len(best)
    counted = sum(totals)
    return [total / counted for total in totals] if counted else []
