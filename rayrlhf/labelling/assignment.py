"""Who gets which item next, and in which order its answers are shown.

All that is random follows from the database's `order`, the labeller and the item, so it can be repeated.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from rayrlhf.labelling.database import LabelDatabase

REPEAT_AFTER = 5
"""A labeller sees an item again only after at least so many others."""


@dataclass(frozen=True)
class Assignment:
    """One labeller's next task."""

    item: str
    repeat: int = 0


@dataclass(frozen=True)
class Assigner:
    """Lends items to labellers.

    While an item is lent, it counts as judged by that labeller, so two people are not given the last place of one.
    A lease that has run out is given to the next; a judgement that comes in later still counts. So has
    one that ends later than any lent now: it was lent before the clock was set back.
    """

    database: LabelDatabase
    overlap: int = 1
    """Labellers for each item. Gold items are asked of everybody."""
    repeats: float = 0.05
    """The share of a labeller's tasks that are items seen before."""
    gold: float = 0.1
    """The share of a labeller's tasks that are gold items, as long as there are any."""
    lease_s: float = 1800.0
    clock: Callable[[], float] = field(default=time.time)

    def next(self, labeller: str) -> Assignment | None:
        """Lend the labeller an item: the one that they have, or a new one; None if nothing is left for them."""
        now = self.clock()
        with self.database.writing() as connection:
            held = connection.execute(
                "SELECT item, repeat FROM leases WHERE labeller = ? AND until > ?", (labeller, now)
            ).fetchone()
            found = Assignment(held["item"], held["repeat"]) if held else self._choose(labeller, now)
            if found:
                connection.execute(
                    "INSERT OR REPLACE INTO leases VALUES (?, ?, ?, ?)",
                    (labeller, found.item, found.repeat, now + self.lease_s),
                )
        return found

    def left(self, labeller: str) -> int:
        """How many items wait for this labeller, repeats aside."""
        return len(self._open(labeller, self.clock())) + len(self._gold(labeller))

    def _choose(self, labeller: str, now: float) -> Assignment | None:
        done = self.database.query("SELECT count(*) FROM current WHERE labeller = ?", labeller)[0][0]
        drawn = draw(self.order, labeller, done)
        if drawn < self.repeats and (again := self._repeatable(labeller)):
            return Assignment(again[0], 1)
        if self.repeats <= drawn < self.repeats + self.gold and (gold := self._gold(labeller)):
            return Assignment(gold[0])
        left = self._open(labeller, now) or self._gold(labeller)
        return Assignment(left[0]) if left else None

    @property
    def order(self) -> str:
        """What all chance follows from."""
        return str(self.database.recall("order", ""))

    def _open(self, labeller: str, now: float) -> list[str]:
        """Items that still want this labeller: higher priority first, then those that others have begun."""
        rows = self.database.query(
            """
            SELECT id, priority,
                (SELECT count(*) FROM current WHERE item = id AND repeat = 0) + (
                    SELECT count(*) FROM leases
                    WHERE item = id AND repeat = 0 AND until > ?2 AND until <= ?2 + ?4 AND labeller != ?1
                    AND NOT EXISTS (
                        SELECT 1 FROM current
                        WHERE current.item = id AND current.labeller = leases.labeller AND current.repeat = 0
                    )
                ) AS taken
            FROM items
            WHERE gold IS NULL AND taken < ?3
            AND NOT EXISTS (SELECT 1 FROM current WHERE item = id AND labeller = ?1 AND repeat = 0)
            ORDER BY priority DESC, taken DESC, position
            """,
            labeller,
            now,
            self.overlap,
            self.lease_s,
        )
        return [row["id"] for row in rows]

    def _gold(self, labeller: str) -> list[str]:
        """Gold items that the labeller has not seen, in an order of their own."""
        rows = self.database.query(
            "SELECT id FROM items WHERE gold IS NOT NULL AND NOT EXISTS "
            "(SELECT 1 FROM current WHERE item = id AND labeller = ? AND repeat = 0)",
            labeller,
        )
        order = self.order
        return sorted((row["id"] for row in rows), key=lambda item: draw(order, labeller, item))

    def _repeatable(self, labeller: str) -> list[str]:
        """Items that the labeller ranked once and long enough ago, the oldest first."""
        own = self.database.judgements(labeller)
        again = {judgement.item for judgement in own if judgement.repeat}
        return [
            judgement.item
            for judgement in own[: max(0, len(own) - REPEAT_AFTER)]
            if judgement.repeat == 0 and judgement.ranks is not None and judgement.item not in again
        ]


def draw(*parts: object) -> float:
    """A number in [0, 1) that looks random and follows from the parts."""
    return random.Random(_seed(*parts)).random()


def shown_order(order: str, labeller: str, item: str, repeat: int, count: int) -> tuple[int, ...]:
    """[K] indices of the answers in the order in which this labeller sees them, this time."""
    indices = list(range(count))
    random.Random(_seed(order, labeller, item, repeat)).shuffle(indices)
    return tuple(indices)


def _seed(*parts: object) -> int:
    text = "\0".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
