"""Answers with a label, good or bad: what KTO learns from where there are no pairs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from rayrlhf.data.records import LabelledAnswer


@dataclass(frozen=True)
class LabelledAnswers:
    """K >= 1 answers to one prompt, each good or bad by itself. Rows of a data set with equal prompts are together."""

    labelled: ClassVar[bool] = True

    id: str
    """That of its first row."""
    prompt_ids: tuple[int, ...]
    response_ids: tuple[tuple[int, ...], ...]
    """K tuples of token ids; an answer that ended by itself has its EOS."""
    labels: tuple[bool, ...]
    """[K] True for a good answer, False for a bad one."""
    heldout: bool = False
    """True if the record is kept out of training, to measure the policy."""
    source: str = ""

    @property
    def examples(self) -> int:
        """K: all answers have the same weight."""
        return len(self.labels)

    @property
    def counts(self) -> dict[str, int]:
        return {"good answers": sum(self.labels), "bad answers": len(self.labels) - sum(self.labels)}

    @property
    def teaches(self) -> bool:
        return True


def group_answers(
    rows: Sequence[LabelledAnswer], max_response_tokens: int, heldout: bool = False
) -> tuple[list[LabelledAnswers], Counter[str]]:
    """Turn rows into training records: one for each prompt of a source, in the order of their first rows.

    An answer longer than `max_response_tokens` is cut and then has no EOS. Rows of one record whose answers have the
    same tokens, and are called good by one row and bad by another, are left out: what they teach cancels.

    Returns:
        The records, and how many rows were left out as `good_and_bad`.
    """
    together: dict[tuple[str, tuple[int, ...]], list[tuple[str, tuple[int, ...], bool]]] = {}
    for row in rows:
        response = row.response_ids[0][:max_response_tokens]
        together.setdefault((row.source, row.ids), []).append((row.id, response, row.good))
    records = []
    for (source, shared), own in together.items():
        verdicts = {(response, good) for _, response, good in own}
        kept = [each for each in own if (each[1], not each[2]) not in verdicts]
        if kept:
            ids, response_ids, labels = zip(*kept, strict=True)
            records.append(LabelledAnswers(ids[0], shared, response_ids, labels, heldout, source))
    return records, +Counter(good_and_bad=len(rows) - sum(record.examples for record in records))
