"""Data files of any content, whole or damaged: records, or one line that says what is wrong and where."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rayrlhf.config_data import DatasetConfig
from rayrlhf.data.formats import FORMATS
from rayrlhf.data.loading import read_file
from rayrlhf.data.sources import DataSet, Rendering
from rayrlhf.errors import UserError
from tests.fuzz import CASES, damaged, said_of, try_cases

ROOT = Path(__file__).parents[2]
MESSAGES = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So it is."}]
ASKED = MESSAGES[:1]
POST = "SUBREDDIT: r/dogs\n\nTITLE: My dog\n\nPOST: He ate it.\n\nTL;DR:"
DIALOGUE = "\n\nHuman: Why?\n\nAssistant: So it is."
GOOD: list[dict[str, Any]] = [
    {"prompt": "Why?", "response": "So it is."},
    {"prompt": ASKED, "completion": MESSAGES[1:]},
    {"messages": MESSAGES, "level": 2},
    {"prompt": "Why?", "chosen": "So it is.", "rejected": "I have no idea."},
    {"prompt": "Why?", "responses": ["So it is, I think.", "I have no idea at all."], "scores": [2, 1.5]},
    {"prompt": "Why?", "responses": ["So it is, I think.", "I have no idea at all."], "ranking": [1, 0]},
    {"prompt": "Why?", "completion": "So it is.", "label": True},
    {"instruction": "Say why", "input": "it", "output": "So it is.", "history": [["a", "b"]], "system": "Be brief"},
    {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So it is."}]},
    {"subreddit": "dogs", "title": "My dog", "post": "He ate it.", "summary": "dog eats"},
    {"prompt": POST, "label": "dog eats"},
    {"chosen": DIALOGUE, "rejected": DIALOGUE.replace("So it is", "No idea")},
    {"history": "Why?", "human_ref_A": "So it is.", "human_ref_B": "No idea.", "labels": 1, "domain": "dogs"},
]
"""A row of each format, and of each way to write one."""
COLUMNS = sorted({column for row in GOOD for column in row} | {"id", "source", "when", ""})

text = st.text(st.characters(), max_size=12)  # half an emoji included
scalar = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.sampled_from([10**400, float("nan"), float("inf"), -0.0, 1e308]),
    st.floats(),
    text,
    st.sampled_from(["user", "assistant", POST, DIALOGUE, "a " * 200, "x" * 3000, "<s></s><pad>", "\x00", "\ufffe"]),
)
turn = st.dictionaries(
    st.sampled_from(["role", "content", "from", "value", "type", "text", "more"]), scalar, max_size=3
)
value = st.recursive(
    scalar | turn,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=6,
)


@st.composite
def rows(draw: Any) -> list[dict[str, Any]]:
    """Rows of one format, some of whose columns hold something else, are missing or are foreign."""
    base = draw(st.sampled_from(GOOD))
    found = []
    for number in range(draw(st.integers(1, 6))):
        row = dict(base) | ({"prompt": f"{number} {base['prompt']}"} if isinstance(base.get("prompt"), str) else {})
        for column in draw(st.lists(st.sampled_from([*base, *COLUMNS]), max_size=2)):
            if draw(st.booleans()):
                row[column] = draw(value)
            else:
                row.pop(column, None)
        found.append(row)
    return found


@st.composite
def json_files(draw: Any) -> tuple[str, bytes]:
    lines = [json.dumps(row, ensure_ascii=draw(st.booleans())) for row in draw(rows())]
    odd = draw(st.sampled_from([None, None, "[" * 2000, '{"id": ' + "7" * 5000 + "}", '{"a":' * 150 + "1" + "}" * 150]))
    if odd:
        lines.insert(draw(st.integers(0, len(lines))), odd)
    whole = draw(st.booleans())
    content = f"[{','.join(lines)}]" if whole else "\n".join(lines)
    return ".json" if whole else ".jsonl", content.encode("utf-8", "surrogatepass")


@st.composite
def csv_files(draw: Any) -> tuple[str, bytes]:
    given, tabs = draw(rows()), draw(st.booleans())
    stream = io.StringIO()
    writer = csv.writer(stream, "excel-tab" if tabs else "excel")
    header = list(dict.fromkeys(column for row in given for column in row))
    writer.writerows([header, *([row.get(column) for column in header] for row in given)])
    return ".tsv" if tabs else ".csv", stream.getvalue().encode("utf-8", "surrogatepass")


def column_of(kind: str, numbers: list[int]) -> pa.Array:
    """Values that a file can hold: far dates, unknown zones, bytes that are no text."""
    whole = pa.array(numbers, pa.int64())
    bytes_ = pa.array([number.to_bytes(8, "big", signed=True) for number in numbers], pa.binary())
    match kind:
        case "text":
            return pa.array([f"Why {number}?" for number in numbers])
        case "no text":
            return bytes_.view(pa.string())
        case "messages":
            return pa.array([MESSAGES for _ in numbers])
        case "lists":
            return pa.array([[number, number] for number in numbers]).cast(pa.list_(pa.int64()))
        case "bytes":
            return bytes_
        case "date":
            return pa.array([number % 2**31 for number in numbers], pa.int32()).view(pa.date32())
        case "duration":
            return whole.view(pa.duration("s"))
        case "zone":
            return whole.view(pa.timestamp("us", "Nowhere/Land"))
        case "dates":
            return pa.ListArray.from_arrays(
                pa.array(range(len(numbers) + 1), pa.int32()), whole.view(pa.timestamp("us"))
            )
        case "dictionary":
            return bytes_.view(pa.string()).cast(pa.binary()).dictionary_encode()
        case _:
            return whole.view(pa.timestamp(kind))


KINDS = ["text", "no text", "messages", "lists", "bytes", "date", "duration", "zone", "dates", "dictionary", "us", "ns"]


@st.composite
def columnar_files(draw: Any) -> tuple[str, bytes]:
    numbers = draw(st.lists(st.integers(-(2**62), 2**62), min_size=1, max_size=5))
    names = draw(st.lists(st.sampled_from(COLUMNS), max_size=4))
    arrays = [column_of("text", numbers), column_of("text", numbers)]
    arrays += [column_of(draw(st.sampled_from(KINDS)), numbers) for _ in names]
    table = pa.table(arrays, names=["prompt", "response", *names])
    stream = io.BytesIO()
    if draw(st.booleans()):
        pq.write_table(table, stream, write_page_checksum=draw(st.booleans()))
        return ".parquet", stream.getvalue()
    new = pa.ipc.new_file if draw(st.booleans()) else pa.ipc.new_stream
    with new(stream, table.schema) as writer:
        writer.write_table(table)
    return ".arrow", stream.getvalue()


@st.composite
def files(draw: Any, kinds: st.SearchStrategy[tuple[str, bytes]]) -> tuple[str, bytes]:
    """Ending and content, of which every second one is damaged and some are compressed, before it or after it."""
    ending, content = draw(kinds)
    harm = draw(st.sampled_from([None, None, "inside", "outside"]))
    if harm == "inside":
        content = damaged(content, draw)
    if ending not in (".parquet", ".arrow"):
        packing = draw(st.sampled_from(["", "", ".gz", ".zst"]))
        ending += packing
        if packing:
            content = gzip.compress(content) if packing == ".gz" else pa.compress(content, "zstd", asbytes=True)
    return ending, damaged(content, draw) if harm == "outside" else content


@lru_cache
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(ROOT / "rayrlhf/assets/opt-tiny")


READERS: dict[str, tuple[tuple[Any, ...], Callable[[DataSet], Any]]] = {
    "demonstrations": (("demonstration",), lambda source: source.demonstrations("all")),
    "prompts": (("prompt",), lambda source: source.prompts("all")),
    "comparisons": (("comparison",), lambda source: source.comparisons("all")),
    "labelled": (("labelled",), lambda source: source.labelled("all")),
}


@CASES
@pytest.mark.parametrize("kind", ["json", "csv", "columnar"])
def test_any_file_is_read_or_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, cases: int
) -> None:
    kinds = {"json": json_files(), "csv": csv_files(), "columnar": columnar_files()}
    numbers = itertools.count()
    settings = st.fixed_dictionaries(
        {"skip_bad_rows": st.booleans()}, optional={"format": st.sampled_from(sorted(FORMATS))}
    )

    def check(case: tuple[tuple[str, bytes], str, dict[str, Any]]) -> None:
        (ending, content), use, keys = case
        path = tmp_path / f"{next(numbers)}{ending}"
        path.write_bytes(content)
        uses, read = READERS[use]

        def command() -> None:
            found = read(DataSet([DatasetConfig(path=str(path), **keys)], Rendering(tokenizer(), 64), *uses))
            for record in found.records:
                json.dumps(record.answers, ensure_ascii=False).encode()  # what a tokenizer and a terminal can take

        said = said_of(command, capsys)
        path.unlink()
        assert said is None or path.name in said or "data format" in said

    try_cases(cases, check, st.tuples(files(kinds[kind]), st.sampled_from(sorted(READERS)), settings))


@CASES
@pytest.mark.parametrize("ending", [".jsonl.gz", ".parquet"])
def test_what_a_checksum_covers_is_never_taken_damaged(tmp_path: Path, ending: str, cases: int) -> None:
    """Of the Parquet file, whose last part has no checksum, the pages are damaged."""
    whole = [{"prompt": f"Why {number}?", "response": "So it is. " * number} for number in range(1, 30)]
    path, columns = tmp_path / f"a{ending}", tmp_path / "whole.parquet"
    pq.write_table(pa.Table.from_pylist(whole), columns, write_page_checksum=True)
    content = columns.read_bytes()
    end = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    pages, rest = content[:end], content[end:]
    if ending != ".parquet":
        pages, rest = gzip.compress("".join(json.dumps(row) + "\n" for row in whole).encode()), b""
    taken = 0

    def check(bit: int) -> None:
        nonlocal taken
        flipped = bytearray(pages)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bytes(flipped) + rest)
        try:
            read = [row.values for row in read_file(path)]
        except UserError:
            return
        taken += 1
        assert read == whole

    try_cases(cases, check, st.integers(0, 8 * len(pages) - 1))
    assert taken < cases / 2
