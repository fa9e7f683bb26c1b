"""The rows of every kind of file, by a name, a pattern, a directory or a URI."""

from __future__ import annotations

import glob
import gzip
import json
import random
from collections.abc import Callable
from datetime import date, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest

from rayrlhf.config_data import DatasetConfig
from rayrlhf.data import files
from rayrlhf.data.arrow_values import held_rows
from rayrlhf.data.files import READERS
from rayrlhf.data.formats import Use
from rayrlhf.data.loading import load_source, read_file
from rayrlhf.data.reading import Reading
from rayrlhf.errors import UserError

ROWS = [{"prompt": 'A "quoted", long\nquestion', "response": "grüße"}, {"prompt": "b", "response": "c"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\r\n\r\n" for row in ROWS)
CSV = 'prompt,response\r\n"A ""quoted"", long\nquestion",grüße\r\n\r\nb,c\r\n'


def arrow_stream(path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


WRITERS: dict[str, Callable[[Path], Any]] = {
    "a.jsonl": lambda path: path.write_text(LINES, encoding="utf-8-sig", newline=""),
    "a.JSONL.gz": lambda path: path.write_bytes(gzip.compress(LINES.encode()[:9]) + gzip.compress(LINES.encode()[9:])),
    "a.jsonl.zst": lambda path: path.write_bytes(pa.compress(LINES.encode(), "zstd", asbytes=True)),
    "a.json": lambda path: path.write_text(json.dumps(ROWS, indent=1)),
    "a.csv": lambda path: path.write_text(CSV, encoding="utf-8-sig", newline=""),
    "a.csv.gz": lambda path: path.write_bytes(gzip.compress(CSV.encode())),
    "a.tsv": lambda path: path.write_text(CSV.replace(",", "\t").replace('"\t long', '", long'), newline=""),
    "a.parquet": lambda path: pq.write_table(pa.Table.from_pylist(ROWS), path),
    "a.arrow": arrow_stream,
    "b.arrow": lambda path: feather.write_feather(pa.Table.from_pylist(ROWS), str(path)),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_has_the_same_rows(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    for path in (str(tmp_path / name), f"file://{tmp_path}/{name}"):
        found = list(load_source(DatasetConfig(path=path)).train)
        assert [row.values for row in found] == ROWS
        assert path.removeprefix("file://") in found[0].where


def test_rows_are_named_by_their_lines(tmp_path: Path) -> None:
    """A quoted value over two lines and a blank line count; the header is the first one."""
    (tmp_path / "a.csv").write_text(CSV)
    assert [row.where.split()[-1] for row in read_file(tmp_path / "a.csv")] == ["2", "5"]
    (tmp_path / "a.jsonl").write_text(LINES)
    assert [row.where.split()[-1] for row in read_file(tmp_path / "a.jsonl")] == ["1", "3"]


def test_an_empty_value_of_csv_is_a_missing_one(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,prompt\n,a\n")
    (row,) = read_file(tmp_path / "a.csv")
    assert row.values == {"id": None, "prompt": "a"} and row.id is None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"a,b\n1,2\n1,2,3\n", r"a.csv line 3: 3 values for the 2 columns a, b; .* in \"quotes\""),
        ("a.csv", b"a,a\n1,2\n", r"a.csv line 1: two columns are called 'a'"),
        ("a.csv", b'a,b\n1,2\n"1,2\n', r"a.csv line 3: not valid CSV"),
        ("a.csv", b"a,b\n1,\xe9\n", r"a.csv line 2: not UTF-8 text \(byte 0xe9\)"),
        ("a.csv", b"a,b\n", r"a.csv: the file holds no rows"),
        ("a.jsonl.zst", b"nonsense", r"a.jsonl.zst: cannot be read"),
        ("a.arrow", b"nonsense", r"a.arrow: cannot be read"),
    ],
)
def test_damaged_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read_file(tmp_path / name)
    assert "\n" not in str(error.value)


def test_json_that_python_refuses_for_its_size(tmp_path: Path) -> None:
    """Both are errors of other kinds than that of wrong syntax."""
    digits, brackets = f'{{"a": {5000 * "1"}}}', 100_000 * "["
    for name, content, message in (
        ("a.jsonl", f'{{"a": 1}}\n{digits}', r"a.jsonl line 2: cannot be read as JSON \(Exceeds the limit"),
        ("a.jsonl", brackets, r"a.jsonl line 1: cannot be read as JSON \(more than 100 objects and lists"),
        ("a.json", f"[{digits}]", r"a.json: cannot be read as JSON \(Exceeds the limit"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=message):
            read_file(tmp_path / name)


def test_a_key_that_stands_twice_in_a_json_object(tmp_path: Path) -> None:
    """Python's reader would take the last value, and the first would be gone without a word."""
    row = '{"prompt": [{"role": "user", "content": "a", "role": "assistant"}], "response": "b"}'
    for name, content, where in (("a.jsonl", f'{{"a": 1}}\n{row}', "a.jsonl line 2"), ("a.json", f"[{row}]", "a.json")):
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=f"{where}: cannot be read as JSON .an object has the key 'role' twice"):
            read_file(tmp_path / name)


def test_patterns_of_files(tmp_path: Path) -> None:
    for k in (2, 1):
        (tmp_path / f"part-{k}.jsonl").write_text(json.dumps({"prompt": str(k)}))
    (tmp_path / "other.jsonl").write_text("nonsense")
    for path in (f"{tmp_path}/part-*.jsonl", f"file://{tmp_path}/part-*.jsonl"):
        assert [row.values["prompt"] for row in load_source(DatasetConfig(path=path)).train] == ["1", "2"]
    for path in (f"{tmp_path}/no-*.jsonl", f"file://{tmp_path}/no.jsonl", f"file://{tmp_path}/nowhere/a.jsonl"):
        with pytest.raises(UserError, match=r"no.*: no (such file|file matches)"):
            load_source(DatasetConfig(path=path))


def test_files_of_a_directory_may_differ_in_their_columns(tmp_path: Path) -> None:
    """As rows of one file may. `datasets` takes all files for one table and refuses them."""
    rows = [{"prompt": "a", "x": 1}, {"prompt": [{"role": "user", "content": "b"}]}]
    for k, row in enumerate(rows):
        (tmp_path / f"train-{k}.jsonl").write_text(json.dumps(row))
    (tmp_path / "validation.jsonl").write_text(json.dumps({"prompt": "c"}))
    (tmp_path / "test.jsonl").write_text(json.dumps({"prompt": "d"}))
    found = load_source(DatasetConfig(path=str(tmp_path)))
    assert [row.values for row in found.train] == rows and found.valid is not None
    assert [row.values for row in found.valid] == [{"prompt": "c"}] and found.unused == ("test",)


def test_files_of_a_directory_that_are_not_read_are_named(tmp_path: Path) -> None:
    """`datasets` reads one kind of file in a directory."""
    for name in ("train.jsonl", "validation.jsonl", "more.csv"):
        (tmp_path / name).write_text(json.dumps({"prompt": "a"}))
    (tmp_path / "notes.txt").write_text("no data")
    for path in (str(tmp_path), f"file://{tmp_path}"):
        assert load_source(DatasetConfig(path=path)).left_out == ("more.csv",)


def test_a_uri_names_a_directory_as_a_path_does(tmp_path: Path) -> None:
    """Splits by names of files, of directories and in a README; hidden files; and what `datasets` has saved."""
    from datasets import Dataset, DatasetDict

    def put(folder: str, *names: str) -> None:
        for name in names:
            (tmp_path / folder / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / folder / name).write_text(json.dumps({"prompt": name}))

    put("names", "train-1.jsonl", "train-0.jsonl", "validation.jsonl", "test.jsonl")
    put("folders", "train/b.jsonl", "train/a.jsonl", "dev/c.jsonl", ".hidden/d.jsonl")
    put("alone", "a.jsonl", "b.jsonl")
    put("readme", "x.jsonl", "y.jsonl")
    splits = "[{split: train, path: y.jsonl}, {split: validation, path: x.jsonl}]"
    readme = "---\nconfigs: [{config_name: default, data_files: " + splits + "}]\n---\n"
    (tmp_path / "readme/README.md").write_text(readme)
    one = Dataset.from_list(ROWS)
    one.save_to_disk(tmp_path / "one")
    DatasetDict({"train": one, "validation": one.select([1]), "extra": one}).save_to_disk(tmp_path / "both")

    def found(path: str) -> Any:
        source = load_source(DatasetConfig(path=path))
        valid = None if source.valid is None else [row.values for row in source.valid]
        return [row.values for row in source.train], valid, source.unused, source.left_out

    for folder in ("names", "folders", "alone", "readme", "one", "both"):
        assert found(f"file://{tmp_path}/{folder}/") == found(str(tmp_path / folder)), folder
    assert found(f"file://{tmp_path}/readme")[:2] == ([{"prompt": "y.jsonl"}], [{"prompt": "x.jsonl"}])
    assert found(f"file://{tmp_path}/both") == (ROWS, ROWS[1:], ("extra",), ())


@pytest.mark.parametrize("pattern", ["names/*.jsonl", "*/part.jsonl", "**/*.jsonl", "names/**", "na*/x-[1].jsonl"])
def test_patterns_of_uris_are_those_of_paths(tmp_path: Path, pattern: str) -> None:
    for name in ("names/x-1.jsonl", "names/x-[1].jsonl", "names/deep/part.jsonl", "other/part.jsonl", "top.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"prompt": name}))
    paths = sorted(path for path in glob.glob(f"{tmp_path}/{pattern}", recursive=True) if Path(path).is_file())
    wanted = [json.loads(Path(path).read_text()) for path in paths]
    if "[" in pattern:  # `glob` has sets of characters, which no name of a bucket needs
        wanted = [{"prompt": "names/x-[1].jsonl"}]
    assert [row.values for row in load_source(DatasetConfig(path=f"file://{tmp_path}/{pattern}")).train] == wanted


def test_what_datasets_has_saved(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    one = Dataset.from_list(ROWS)
    one.save_to_disk(tmp_path / "one")
    DatasetDict({"train": one, "validation": one.select([1])}).save_to_disk(tmp_path / "both")
    found = load_source(DatasetConfig(path=str(tmp_path / "one")))
    assert [row.values for row in found.train] == ROWS and found.valid is None
    found = load_source(DatasetConfig(path=str(tmp_path / "both")))
    assert found.valid is not None and [row.values for row in found.valid] == ROWS[1:]
    assert [row.where for row in found.train] == [f"{tmp_path}/both train row {n}" for n in (1, 2)]


def test_every_reader_is_tried() -> None:
    assert {ending for ending in READERS if ending != ".ndjson"} == {
        f".{name.split('.')[1].lower()}" for name in WRITERS
    }


def test_values_beyond_pythons_range_are_texts_and_counted(tmp_path: Path) -> None:
    """Day 2,932,897 after 1970 is the first of the year 10000, which Python's dates do not reach."""
    day = 2_932_897
    columns = {
        "prompt": pa.array(["a", "b"]),
        "day": pa.array([day, 0], pa.int32()).view(pa.date32()),
        "at": pa.array([day * 86_400_000_000, 0], pa.int64()).view(pa.timestamp("us")),
        "there": pa.array([0, None], pa.int64()).view(pa.timestamp("us", "Nowhere/Land")),
        "many": pa.ListArray.from_arrays(pa.array([0, 1, 1]), pa.array([day], pa.int32()).view(pa.date32())),
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    first, second = read_file(tmp_path / "a.parquet")
    assert first.values == {
        "prompt": "a", "day": "10000-01-01", "at": "10000-01-01 00:00:00.000000",
        "there": "timestamp[us, tz=Nowhere/Land]", "many": ["10000-01-01"],
    }  # fmt: skip
    assert second.values == {
        "prompt": "b", "day": date(1970, 1, 1), "at": datetime(1970, 1, 1), "there": None, "many": [],
    }  # fmt: skip
    assert (first.odd, second.odd, first.mended) == (True, False, False)


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_bytes_that_are_no_text_are_replaced_and_counted(tmp_path: Path, name: str) -> None:
    texts = pa.array([b"caf\xe9", "café".encode()], pa.binary()).view(pa.string())
    table = pa.table({"prompt": texts})
    write = pq.write_table if name == "a.parquet" else feather.write_feather
    write(table, str(tmp_path / name))
    rows = read_file(tmp_path / name)
    assert [row.values["prompt"] for row in rows] == ["caf\ufffd", "café"]
    assert [row.mended for row in rows] == [True, False]


def test_damage_behind_good_rows_names_the_last_of_them(tmp_path: Path) -> None:
    texts = random.Random(0)  # which do not compress well, so that the file is read in several pieces
    content = gzip.compress(b"".join(b'{"prompt": "%s"}\n' % texts.randbytes(4500).hex().encode() for _ in range(99)))
    for end in (b"", content[-8:-4] + b"\0\0\0\0"):  # cut short; and a length that is another one
        (tmp_path / "a.jsonl.gz").write_bytes(content[:-8] + end)
        with pytest.raises(UserError, match=r"a\.jsonl\.gz line \d+ and behind it: cannot be read \("):
            read_file(tmp_path / "a.jsonl.gz")


def test_columns_of_arrow_that_end_elsewhere_are_refused(tmp_path: Path) -> None:
    """Arrow itself would read beyond the texts."""
    ends = pa.py_buffer(np.array([0, 10**6, 2], np.int32).tobytes())
    column = pa.Array.from_buffers(pa.string(), 2, [None, ends, pa.py_buffer(b"ab")])
    batch = pa.RecordBatch.from_arrays([column], ["prompt"])
    with pytest.raises(pa.ArrowInvalid):
        list(held_rows(batch))
    twins = pa.RecordBatch.from_arrays([pa.array([1]), pa.array([2])], ["a", "a"])
    with pytest.raises(pa.ArrowInvalid, match="two columns are called 'a'"):
        list(held_rows(twins))


def test_a_line_is_no_longer_than_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few kilobytes of compressed data can spell gigabytes."""
    monkeypatch.setattr(files, "_LONGEST_LINE", 2**20)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "a"}\n' + bytes(2**21)))
    with pytest.raises(UserError, match=r"a\.jsonl\.gz line 2: longer than 1 MiB"):
        read_file(tmp_path / "a.jsonl.gz")


@pytest.mark.parametrize(
    ("row", "use", "message"),
    [
        ({"messages": [{"role": ["user"], "content": "a"}]}, "prompt", "message 1 has the role"),
        ({"instruction": "a", "output": "b", "history": 7}, "prompt", "'history' must be a list"),
        ({"prompt": "a", "responses": ["b", "c"], "scores": [1, 10**400]}, "comparison", "'scores' must be a number"),
        ({"messages": [{"role": "x" * 10**5, "content": "a"}]}, "prompt", "message 1 has the role"),
    ],
)
def test_odd_values_of_a_row_are_one_short_line(tmp_path: Path, row: dict[str, Any], use: Use, message: str) -> None:
    """They were tracebacks, or as long as the value."""
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    with pytest.raises(UserError, match=f"a.jsonl line 1: {message}") as error:
        Reading([DatasetConfig(path=str(tmp_path / "a.jsonl"))], use).split("all")
    assert len(str(error.value)) <= 300


def test_rows_with_half_an_emoji_are_counted_each(tmp_path: Path) -> None:
    """A whole one, which JSON may spell in two halves, is none."""
    rows = r"""[{"a": "\ud83d\ude00"}, {"a": ["\ud83d"]}, {"\ude00": 1}]"""
    (tmp_path / "a.json").write_text(rows)
    (tmp_path / "a.jsonl").write_text(rows[1:-1].replace("}, {", "}\n{"))
    for name in ("a.json", "a.jsonl"):
        found = read_file(tmp_path / name)
        assert [row.values for row in found] == [{"a": "\U0001f600"}, {"a": ["\ufffd"]}, {"\ufffd": 1}]
        assert [row.mended for row in found] == [False, True, True]
