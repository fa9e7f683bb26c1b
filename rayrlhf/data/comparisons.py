"""Judged answers, and of these the ranked ones: what the `collect` stage writes and the reward model trains on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from rayrlhf.data.records import Comparison
from rayrlhf.data.words import count_words
from rayrlhf.errors import UserError
from rayrlhf.files import replacing
from rayrlhf.wording import in_a_line, names

MIN_WORDS = 5
"""An answer with fewer words (`rayrlhf.data.words.count_words`) counts as nearly empty: preferences about such answers
teach length, not quality."""

_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("prompt", pa.string()),
        ("prompt_ids", pa.list_(pa.int64())),
        ("responses", pa.list_(pa.string())),
        ("response_ids", pa.list_(pa.list_(pa.int64()))),
        ("ranking", pa.list_(pa.int64())),
        ("scores", pa.list_(pa.float64())),
        ("labeller", pa.string()),
        ("source", pa.string()),
        ("heldout", pa.bool_()),
        ("gold", pa.list_(pa.float64())),
    ]
)
_OPTIONAL = {"gold"}
"""Columns that files of earlier versions lack."""


class Answers(Protocol):
    """Answers to one prompt, and how good they are: `RankedAnswers`, or `LabelledAnswers` of `data.labelled`."""

    labelled: ClassVar[bool]
    """Whether each answer has a label, not a rank among the others."""

    @property
    def id(self) -> str: ...
    @property
    def prompt_ids(self) -> tuple[int, ...]: ...
    @property
    def response_ids(self) -> tuple[tuple[int, ...], ...]: ...
    @property
    def heldout(self) -> bool: ...
    @property
    def source(self) -> str: ...

    @property
    def examples(self) -> float:
        """How much it counts in the mean over a batch."""

    @property
    def counts(self) -> dict[str, int]:
        """What is learnt from: a number by its name in words."""

    @property
    def teaches(self) -> bool:
        """Whether there is anything to learn from."""


@dataclass(frozen=True)
class RankedAnswers:
    """K >= 2 answers to one prompt, best first.

    Example: the answers "b", "c", "a" with scores (0.9, 0.4, 0.4) have the pairs (0, 1) and (0, 2); "c" and "a" tie.
    """

    labelled: ClassVar[bool] = False

    id: str
    prompt: str
    prompt_ids: tuple[int, ...]
    responses: tuple[str, ...]
    response_ids: tuple[tuple[int, ...], ...]
    """K tuples of token ids; an answer that ended by itself has its EOS."""
    scores: tuple[float, ...] | None
    """[K] the labeller's measure of each answer, highest first; None if the labeller only ranks."""
    labeller: str
    heldout: bool = False
    """True if the record is kept out of training, to measure the reward model's accuracy."""
    source: str = ""
    gold: tuple[float | None, ...] | None = None
    """[K] the gold measure of each answer, which nothing is trained on; None where the labeller's scores are it."""
    weight: float = 1.0
    """How much it counts in the loss; it is no part of the file, since it is the reader's."""

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """(better, worse) indices. Answers with equal scores make no pair, nor do answers with equal token ids."""
        count = len(self.responses)
        # Two texts may differ and still be cut to the same tokens; such a pair would have no gradient.
        return tuple(
            (i, j)
            for i in range(count)
            for j in range(i + 1, count)
            if (self.scores is None or self.scores[i] > self.scores[j]) and self.response_ids[i] != self.response_ids[j]
        )

    @property
    def examples(self) -> float:
        """`weight`, whatever the number of its pairs."""
        return self.weight

    @property
    def counts(self) -> dict[str, int]:
        return {"pairs": len(self.pairs)}

    @property
    def teaches(self) -> bool:
        return bool(self.pairs)


def usable_answers(answers: Sequence[str]) -> tuple[list[int], Counter[str]]:
    """Choose the answers that are worth ranking.

    Returns:
        Their indices, and how many of the others were `nearly_empty` or `identical` to an earlier one.
    """
    kept: list[int] = []
    dropped: Counter[str] = Counter()
    seen: set[str] = set()
    for index, answer in enumerate(answers):
        if count_words(answer) < MIN_WORDS:
            dropped["nearly_empty"] += 1
        elif answer.strip() in seen:  # the first one stays: in a comparison it is the better one
            dropped["identical"] += 1
        else:
            kept.append(index)
            seen.add(answer.strip())
    return kept, dropped


def rank_answers(
    *,
    id: str,
    prompt: str,
    prompt_ids: Sequence[int],
    responses: Sequence[str],
    response_ids: Sequence[Sequence[int]],
    order: Sequence[int],
    scores: Sequence[float] | None,
    labeller: str,
    heldout: bool = False,
    source: str = "",
    gold: Sequence[float | None] | None = None,
) -> RankedAnswers:
    """Sort answers by a labeller's ranking.

    Args:
        order: [K] indices of `responses`, best first.
        scores: [K] the labeller's measures, in the order of `responses`; None if it only ranks.
        gold: [K] the gold measure, in the order of `responses`; None if there is none beside the scores.

    Raises:
        ValueError: `order` does not hold every index once.
    """
    if sorted(order) != list(range(len(responses))):
        raise ValueError(f"{list(order)} is not a ranking of {len(responses)} answers")
    return RankedAnswers(
        id=id,
        prompt=prompt,
        prompt_ids=tuple(prompt_ids),
        responses=tuple(responses[i] for i in order),
        response_ids=tuple(tuple(response_ids[i]) for i in order),
        scores=None if scores is None else tuple(scores[i] for i in order),
        labeller=labeller,
        heldout=heldout,
        source=source,
        gold=None if gold is None else tuple(gold[i] for i in order),
    )


def from_comparisons(
    comparisons: Iterable[Comparison], max_response_tokens: int, heldout: bool = False
) -> list[RankedAnswers]:
    """Turn published comparisons into training records.

    An answer longer than `max_response_tokens` is cut and then has no EOS.
    A comparison is left out if the cut makes all its answers equal.
    """
    ranked = [
        RankedAnswers(
            id=c.id,
            prompt=c.prompt,
            prompt_ids=c.ids,
            responses=c.responses,
            response_ids=tuple(ids[:max_response_tokens] for ids in c.response_ids),
            scores=c.scores,
            labeller="people",
            heldout=heldout,
            source=c.source,
        )
        for c in comparisons
    ]
    # After the cut, not before: two long answers may differ behind it only.
    return [record for record in ranked if record.pairs]


def of_run(records: Sequence[RankedAnswers], run: str, weight: float = 1.0) -> list[RankedAnswers]:
    """One run's comparisons, as they stand beside those of others.

    Args:
        records: of the run.
        run: its name, the `source` of all that have none.
        weight: of those that are learnt from; of weight 0, they are left out. Held-out ones all stay.
    """
    return [
        replace(record, source=record.source or run, weight=1.0 if record.heldout else weight)
        for record in records
        if record.heldout or weight > 0
    ]


def write_comparisons(path: Path, records: Sequence[RankedAnswers]) -> None:
    """Write `comparisons.parquet`, whole or not at all.

    A row is a prompt with its answers. `ranking` has the indices of `responses`, best first.
    We store the answers sorted, so our `ranking` is always 0, 1, 2, ...; another program may write another order.
    """
    rows = [
        {
            "id": r.id,
            "prompt": r.prompt,
            "prompt_ids": list(r.prompt_ids),
            "responses": list(r.responses),
            "response_ids": [list(ids) for ids in r.response_ids],
            "ranking": list(range(len(r.responses))),
            "scores": None if r.scores is None else list(r.scores),
            "labeller": r.labeller,
            "source": r.source,
            "heldout": r.heldout,
            "gold": None if r.gold is None else list(r.gold),
        }
        for r in records
    ]
    with replacing(path) as temporary:
        pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), temporary, write_page_checksum=True)


def read_ranked(path: Path) -> list[RankedAnswers]:
    """Read a file that `write_comparisons` wrote, or another file with the same columns.

    Raises:
        UserError: there is no such file, it has other columns, or a row's ranking does not fit its answers.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; the collect stage writes it, run that first")
    try:
        table = pq.read_table(path, page_checksum_verification=True)
        missing = [name for name in _SCHEMA.names if name not in table.column_names and name not in _OPTIONAL]
        if missing:
            raise UserError(f"{path}: no column {missing[0]!r}; there are: {names(table.column_names)}")
        rows = _typed(table).to_pylist()
    except (pa.ArrowException, OSError, ValueError) as error:  # not Parquet, or damaged
        raise UserError(
            f"{path}: cannot be read ({in_a_line(str(error))[:100]}); copy it back, or delete it to collect again"
        ) from None
    records = []
    for number, row in enumerate(rows, start=1):
        responses, response_ids, scores = row["responses"], row["response_ids"], row["scores"]
        if len(response_ids) != len(responses) or (scores is not None and len(scores) != len(responses)):
            raise UserError(f"{path} row {number}: responses, response_ids and scores differ in length")
        try:
            columns = {name: row.get(name) for name in _SCHEMA.names if name != "ranking"}
            records.append(rank_answers(**columns, order=row["ranking"]))
        except (ValueError, IndexError) as error:
            raise UserError(f"{path} row {number}: {error}") from None
    return records


def _typed(table: pa.Table) -> pa.Table:
    """The columns that there are of `_SCHEMA`, in its types.

    Raises:
        ValueError: one holds something else, or lacks a value.
    """
    known = [field for field in _SCHEMA if field.name in table.column_names]
    table = table.select([field.name for field in known]).cast(pa.schema(known))
    table.validate(full=True)
    for name in ("id", "prompt", "prompt_ids", "responses", "response_ids", "ranking"):
        values = table.column(name).combine_chunks()
        while not values.null_count and pa.types.is_list(values.type):
            values = values.flatten()
        if values.null_count:
            raise ValueError(f"a value of {name} is missing")
    return table
