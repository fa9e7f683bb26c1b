"""What the page and its script say to each other: an item as it is shown, and a judgement as it comes back.

The script knows answers by the place at which they are shown. Their places in `to_rank.jsonl` stay here, as they may
tell which model an answer is from.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from rayrlhf.config_labellers import MOST_ANSWERS
from rayrlhf.labelling.assignment import Assigner, Assignment, shown_order
from rayrlhf.labelling.dialogue import turns
from rayrlhf.labelling.judgements import Item, Judgement, dense

FLAGS = {
    "harmful": "Harmful",
    "nonsense": "Nonsense",
    "off_topic": "Off topic",
    "personal_data": "Personal data",
    "bad": "Both bad",
}
"""What an answer or a prompt may be flagged as. In a judgement: `harmful:2` of the answer with index 2, and
`harmful:prompt`. `bad` is what the pairs mode says of two answers that are both bad."""
REASONS = ("I cannot tell", "Too long", "I lack the knowledge", "The prompt is broken", "I would rather not read this")
"""Why an item was skipped."""

Value = TypeVar("Value")
Rank = Annotated[int, Field(ge=1, le=MOST_ANSWERS)]
Place = Annotated[int, Field(ge=0, lt=MOST_ANSWERS)]
"""Where an answer is shown, from 0."""


class Sent(BaseModel):
    """A judgement as the script sends it. Lists have a value for each answer, in the order in which it was shown."""

    model_config = ConfigDict(extra="forbid")

    key: Annotated[str, Field(min_length=16, max_length=64)]
    item: Annotated[str, Field(max_length=1000)]
    repeat: Literal[0, 1]
    ranks: Annotated[list[Rank], Field(min_length=2, max_length=MOST_ANSWERS)] | None
    skipped: Annotated[str, Field(max_length=200)] = ""
    flags: Annotated[list[tuple[str, Place | Literal["prompt"]]], Field(max_length=50)] = []
    ratings: Annotated[list[Annotated[int, Field(ge=1, le=7)] | None], Field(max_length=MOST_ANSWERS)] | None = None
    note: Annotated[str, Field(max_length=5000)] = ""
    seconds: Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]
    compared: Annotated[list[tuple[Place, Literal[">", "<", "="], Place]], Field(max_length=36)] = []
    """Of the pairs mode: which two answers were asked about, and which of them is better."""

    def judgement(self, item: Item, labeller: str, shown: Sequence[int]) -> Judgement:
        """The judgement with its answers in the order of `to_rank.jsonl`.

        Raises:
            ValueError: it does not fit the item; the message says how.
        """
        count = len(item.answers)
        for name, values in (("ranks", self.ranks), ("ratings", self.ratings)):
            if values is not None and len(values) != count:
                raise ValueError(f"{name} must have {count} values")
        if (self.ranks is None) != bool(self.skipped.strip()):
            raise ValueError("a judgement has ranks, or a reason why it was skipped")
        if any(flag not in FLAGS or (place != "prompt" and place >= count) for flag, place in self.flags):
            raise ValueError("a flag does not fit the item")
        if any(one == other or max(one, other) >= count for one, _, other in self.compared):
            raise ValueError("two answers that were compared do not fit the item")
        flags = {f"{flag}:{place if place == 'prompt' else shown[place]}" for flag, place in self.flags}
        return Judgement(
            item=item.id,
            labeller=labeller,
            ranks=None if self.ranks is None else dense(unshown(self.ranks, shown)),
            skipped=self.skipped.strip(),
            flags=tuple(sorted(flags)),
            ratings=None if self.ratings is None else tuple(unshown(self.ratings, shown)),
            note=self.note.strip(),
            shown=tuple(shown),
            seconds=self.seconds,
            at=time.time(),
            repeat=self.repeat,
            compared=tuple(_verdict(shown[one], sign, shown[other]) for one, sign, other in self.compared),
        )


def _verdict(one: int, sign: str, other: int) -> str:
    return f"{other}>{one}" if sign == "<" else f"{one}{sign}{other}"


def unshown(values: Sequence[Value], shown: Sequence[int]) -> list[Value]:
    """Values in the order of showing, brought into that of `to_rank.jsonl`."""
    return [values[shown.index(index)] for index in range(len(shown))]


def as_shown(item: Item, task: Assignment, labeller: str, order: str, mine: Judgement | None) -> dict[str, Any]:
    """An item for the script, its answers in the order for this labeller, with what they said of it before."""
    shown = shown_order(order, labeller, item.id, task.repeat, len(item.answers))
    return {
        "id": item.id,
        "repeat": task.repeat,
        "prompt": item.prompt,
        "turns": [vars(turn) for turn in turns(item.prompt)],
        "answers": [item.answers[index] for index in shown],
        "mine": None if mine is None else _mine_as_shown(mine, shown),
    }


def _mine_as_shown(mine: Judgement, shown: Sequence[int]) -> dict[str, Any]:
    flags = [flag.split(":") for flag in mine.flags]
    return {
        "ranks": mine.ranks and [mine.ranks[index] for index in shown],
        "ratings": mine.ratings and [mine.ratings[index] for index in shown],
        "flags": [[flag, place if place == "prompt" else shown.index(int(place))] for flag, place in flags],
        "skipped": mine.skipped,
        "note": mine.note,
    }


def standing(assigner: Assigner, labeller: str) -> dict[str, Any]:
    """How far a labeller is: `done` and `left` in items, and `pace` in seconds an item (the median of the last 20)."""
    own = assigner.database.judgements(labeller)
    recent = [judgement.seconds for judgement in own[-20:] if judgement.seconds]
    return {
        "done": len(own),
        "left": assigner.left(labeller),
        "pace": statistics.median(recent) if recent else None,
    }
