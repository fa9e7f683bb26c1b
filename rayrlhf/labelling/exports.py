"""Judgements out of the database into files, and rankings from files into it.

`rankings.jsonl` is what `collect.labeller.kind=file` reads. Pairs and judgements are for other programs.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rayrlhf.data.files import json_lines
from rayrlhf.errors import UserError
from rayrlhf.files import replacing
from rayrlhf.labelling.aggregate import aggregate
from rayrlhf.labelling.database import LabelDatabase
from rayrlhf.labelling.judgements import Item, Judgement, grouped, ungrouped
from rayrlhf.wording import shown

_PAIRS = pa.schema(
    [
        ("id", pa.string()),
        ("prompt", pa.string()),
        ("answer_a", pa.string()),
        ("answer_b", pa.string()),
        ("preference", pa.string()),
        ("labeller", pa.string()),
        ("compared", pa.bool_()),
    ]
)
_JUDGEMENTS = pa.schema(
    [
        ("id", pa.string()),
        ("prompt", pa.string()),
        ("answers", pa.list_(pa.string())),
        ("labeller", pa.string()),
        ("ranks", pa.list_(pa.int64())),
        ("skipped", pa.string()),
        ("flags", pa.list_(pa.string())),
        ("ratings", pa.list_(pa.int64())),
        ("note", pa.string()),
        ("shown", pa.list_(pa.int64())),
        ("seconds", pa.float64()),
        ("at", pa.float64()),
        ("repeat", pa.int64()),
        ("compared", pa.list_(pa.string())),
    ]
)


def rankings(items: Sequence[Item], judgements: Sequence[Judgement]) -> list[dict[str, Any]]:
    """One ranking an item, as `collect.labeller.kind=file` reads it; items that nobody has seen are left out.

    Of several labellers, the majority orders the answers (`rayrlhf.labelling.aggregate.majority`). An item that
    everybody skipped has the ranking null.

    Returns:
        `{"id": "...", "ranking": [2, [0, 1]]}`: indices of the answers, best first; a list of several is a tie.
    """
    scores = aggregate(judgements, "majority").scores
    seen = {judgement.item for judgement in judgements if judgement.repeat == 0}
    return [
        {"id": item.id, "ranking": grouped([-score for score in scores[item.id]]) if item.id in scores else None}
        for item in items
        if item.id in seen
    ]


def pairs(items: Sequence[Item], judgements: Sequence[Judgement]) -> Iterator[dict[str, Any]]:
    """Every pair of answers that somebody ranked, ties too; first judgements only.

    `compared` is false where a labeller of the pairs mode was not asked about the two.
    """
    by_id = {item.id: item for item in items}
    for judgement in judgements:
        if judgement.ranks is None or judgement.repeat:
            continue
        item = by_id[judgement.item]
        for a, b in itertools.combinations(range(len(item.answers)), 2):
            difference = judgement.ranks[a] - judgement.ranks[b]
            yield {
                "id": item.id,
                "prompt": item.prompt,
                "answer_a": item.answers[a],
                "answer_b": item.answers[b],
                "preference": "tie" if difference == 0 else "a" if difference < 0 else "b",
                "labeller": judgement.labeller,
                "compared": judgement.saw_together(a, b),
            }


def rows(items: Sequence[Item], judgements: Sequence[Judgement]) -> Iterator[dict[str, Any]]:
    """Every judgement with its prompt and answers, repeats and skips too."""
    by_id = {item.id: item for item in items}
    for judgement in judgements:
        item = by_id[judgement.item]
        values = {name: value for name, value in vars(judgement).items() if name != "item"}
        yield {"id": item.id, "prompt": item.prompt, "answers": item.answers, **values}


def export(database: LabelDatabase, directory: Path) -> dict[str, int]:
    """Write all judgements into a directory. Returns how many rows each file has.

    The Parquet files can be read by `datasets.load_dataset("parquet", data_files=...)`.
    """
    items, judgements = database.items(), database.judgements()
    tables: dict[str, tuple[list[dict[str, Any]], pa.Schema | None]] = {
        "rankings.jsonl": (rankings(items, judgements), None),
        "pairs.jsonl": (list(pairs(items, judgements)), None),
        "pairs.parquet": (list(pairs(items, judgements)), _PAIRS),
        "judgements.jsonl": (list(rows(items, judgements)), None),
        "judgements.parquet": (list(rows(items, judgements)), _JUDGEMENTS),
    }
    for name, (content, schema) in tables.items():
        with replacing(directory / name) as temporary:
            if schema is None:
                temporary.write_text(lines(content), encoding="utf-8")
            else:
                pq.write_table(pa.Table.from_pylist(content, schema=schema), temporary)
    return {name: len(content) for name, (content, _) in tables.items()}


def lines(content: Sequence[Mapping[str, Any]]) -> str:
    """Rows as JSON Lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)


def read_rankings(path: Path, items: Sequence[Item]) -> list[tuple[str, str, tuple[int, ...] | None]]:
    """Rankings of a JSON Lines file: lines of `{"id": "...", "ranking": [2, [0, 1]], "labeller": "ann"}`.

    Without a `labeller`, it is `imported`.

    Returns:
        For each line the item's id, the labeller, and [K] ranks or None where it was skipped.

    Raises:
        UserError: no such file, or a line that does not fit the items; it names file and line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    counts = {item.id: len(item.answers) for item in items}
    found: list[tuple[str, str, tuple[int, ...] | None]] = []
    seen: dict[tuple[str, str], int] = {}
    for number, row in json_lines(text, path):
        where = f"{path} line {number}"
        id, labeller = row.get("id"), row.get("labeller", "imported")
        if not isinstance(id, str) or id not in counts:
            raise UserError(f"{where}: id {shown(id)} is not among the items to rank; remove the line")
        check_name(labeller, where)
        if (id, labeller) in seen:
            raise UserError(f"{where}: id {shown(id)} was ranked before, in line {seen[id, labeller]}; keep one")
        ranks = ungrouped(row.get("ranking"), counts[id])
        if ranks is None and ("ranking" not in row or row["ranking"] is not None):
            raise UserError(
                f"{where}: ranking {shown(row.get('ranking'))} must hold each of 0..{counts[id] - 1} once, best first; "
                "a list inside it is a tie"
            )
        seen[id, labeller] = number
        found.append((id, labeller, ranks))
    return found


def import_rankings(database: LabelDatabase, path: Path, now: float) -> int:
    """Add the rankings of a file as judgements; those that the database has already are left out.

    Returns:
        How many were added.
    """
    before = database.written()
    for id, labeller, ranks in read_rankings(path, database.items()):
        if labeller not in database.labellers():
            database.add_labeller(labeller)
        reason = "" if ranks is not None else "imported without a ranking"
        key = "import " + hashlib.sha256(json.dumps([id, labeller, ranks]).encode()).hexdigest()
        database.judge(Judgement(id, labeller, ranks, skipped=reason, at=now), key)
    return database.written() - before


def mark_gold(database: LabelDatabase, path: Path) -> int:
    """Make the items that a file of rankings names gold items, with these ranks. Returns how many."""
    by_id = {item.id: item for item in database.items()}
    gold = {id: ranks for id, _, ranks in read_rankings(path, list(by_id.values()))}
    if blank := [id for id, ranks in gold.items() if ranks is None]:
        raise UserError(f"{path}: the gold item {blank[0]!r} has no ranking; give it one or remove the line")
    marked = [Item(id, by_id[id].prompt, by_id[id].answers, by_id[id].priority, gold[id]) for id in gold]
    database.add_items(marked)
    return len(marked)


def check_name(name: object, where: str) -> str:
    """The name of a labeller.

    Raises:
        UserError: it is no name that fits into a link and a table.
    """
    if (
        not isinstance(name, str)
        or not 1 <= len(name) <= 40
        or not name.replace("-", "_").replace(".", "_").isidentifier()
    ):
        raise UserError(
            f"{where}: labeller {shown(name)}: a name has up to 40 letters, digits, _, - and ., a letter first"
        )
    return name
