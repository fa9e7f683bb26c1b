"""The rows of one file, on this machine or in a store that pyarrow knows, such as S3.

Nothing is unpickled. Rows come one after the other, so that a file may be larger than the memory.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.fs as fs
import pyarrow.parquet as pq

from rayrlhf.data.arrow_values import held_rows
from rayrlhf.data.json_text import mended, parse_json, spells_halves
from rayrlhf.errors import UserError
from rayrlhf.wording import names, shown

_COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
_BLOCK_BYTES = 2**22
_BATCH = 1000  # rows of a columnar file that are Python objects at once
_LONGEST_LINE = 2**28  # bytes; a few of compressed data can stand for more than fits into the memory
_LONGEST_FIELD = 2**31 - 1  # of CSV, in characters; the library's own limit is shorter than many a post


@dataclass(frozen=True)
class SourceRow:
    """One row and its place, so that every error can name it."""

    where: str
    """`FILE line 3` of a file of lines, `FILE row 3` of another one, counted from 1."""
    values: dict[str, Any]
    mended: bool = False
    """Whether the file spells characters that no text can hold; U+FFFD stands in their place."""
    odd: bool = False
    """Whether the file has a value that Python has not, such as the year 300000; its text stands in its place."""

    @property
    def id(self) -> str | None:
        """The value of the column `id`; None if it is missing or blank."""
        value = self.values.get("id")
        return None if value is None or str(value).strip() == "" else str(value)

    def get(self, column: str) -> Any:
        """The value of a column.

        Raises:
            UserError: there is no such column.
        """
        if column not in self.values:
            raise UserError(f"{self.where}: no column {column!r}; there are: {names(self.values)}")
        return self.values[column]

    def text(self, column: str, allow_empty: bool = False) -> str:
        """The text of a column.

        Raises:
            UserError: there is no such column, it holds no text, or it is blank and not `allow_empty`.
        """
        value = self.get(column)
        if value is None and allow_empty:
            return ""
        if value is not None and not isinstance(value, str):
            raise UserError(f"{self.where}: {column!r} must be text, found {type(value).__name__}")
        if value is None or (not allow_empty and not value.strip()):
            raise UserError(f"{self.where}: {column!r} is empty; fill it in or remove the row")
        return str(value)

    def holds(self, *columns: str) -> bool:
        """Whether all these columns are there and hold something."""
        return all(self.values.get(column) is not None for column in columns)

    def first_of(self, *columns: str) -> str:
        """The first of these columns that holds something; if none does, the first of them."""
        return next((column for column in columns if self.holds(column)), columns[0])

    def other_than(self, *columns: str) -> dict[str, Any]:
        """The values of all columns but these."""
        return {column: value for column, value in self.values.items() if column not in columns}


@dataclass(frozen=True)
class DataFile:
    """A file of rows."""

    name: str
    """As errors name it."""
    path: str
    """In `filesystem`."""
    filesystem: fs.FileSystem

    def rows(self) -> Iterator[SourceRow]:
        """Read the rows, in their order.

        Raises:
            UserError: another kind of file, no such file, one that cannot be read, or one without rows.
        """
        ending, compression = kind_of(self.name)
        if ending is None:
            raise UserError(f"{self.name}: unknown kind of file; use {', '.join(READERS)} ({' or '.join(_COMPRESSED)})")
        last: SourceRow | None = None
        with self._opened(lambda: f"{last.where} and behind it" if last else self.name) as opened:
            stream = pa.CompressedInputStream(opened, compression) if compression else opened
            for row in READERS[ending](stream, self.name):
                last = row
                yield row
        if last is None:
            raise UserError(f"{self.name}: the file holds no rows")

    def content(self) -> str:
        """A hash of what decides the rows: the file's bytes, and the kind that its name tells.

        Raises:
            UserError: no such file, or one that cannot be read.
        """
        digest = hashlib.blake2b(repr(kind_of(self.name)).encode(), digest_size=16)
        with self._opened(lambda: self.name) as stream:
            while block := stream.read(_BLOCK_BYTES):
                digest.update(block)
        return digest.hexdigest()

    def read(self) -> bytes:
        """The whole file. See `content` for errors."""
        with self._opened(lambda: self.name) as stream:
            return bytes(stream.read())

    @contextlib.contextmanager
    def _opened(self, place: Callable[[], str]) -> Iterator[Any]:
        """The file as a stream; `place` names it in errors, or the rows behind which it cannot be read."""
        try:
            with self.filesystem.open_input_file(self.path) as stream:
                yield stream
        except FileNotFoundError:
            raise UserError(f"{self.name}: no such file") from None
        except (pa.ArrowException, OSError, EOFError, UnicodeError) as error:  # the last one, of columns' names
            raise UserError(f"{place()}: cannot be read ({first_line(error)})") from None


def kind_of(name: str) -> tuple[str | None, str | None]:
    """The ending by which a file is read, a key of `READERS`, and its compression; None where there is none."""
    lower = name.lower()
    packed = next((ending for ending in _COMPRESSED if lower.endswith(ending)), "")
    ending = next((each for each in READERS if lower.removesuffix(packed).endswith(each)), None)
    return ending, _COMPRESSED.get(packed)


def json_lines(text: str, path: object) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a text with one a line, each with the number of its line; blank lines are left out.

    Args:
        text: the content of a JSON Lines file.
        path: its name in errors.

    Raises:
        UserError: a line that is not JSON, or not an object.
    """
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines() would also cut inside JSON strings
        if line.strip():
            yield number, _row(f"{path} line {number}", line).values


def first_line(error: BaseException) -> str:
    """The first line of what an error says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


# The readers of `datasets` and pyarrow take JSON for a table: they count the rows of a block from 0 in their errors
# and refuse a column that holds a text here and a list there, as `prompt` may.
def _json_rows(stream: Any, name: str) -> Iterator[SourceRow]:
    for where, line in _lines(stream, name):
        if line.strip():
            yield _row(where, line)


def _json_array(stream: Any, name: str) -> Iterator[SourceRow]:
    text = "".join(line for _, line in _lines(stream, name))
    try:
        array = parse_json(text) if text.strip() else []
    except json.JSONDecodeError as error:
        said = first_line(error)
        raise UserError(f"{name}: not valid JSON ({said}); one object a line belongs into a .jsonl file") from None
    except ValueError as error:
        raise UserError(f"{name}: cannot be read as JSON ({first_line(error)})") from None
    if not isinstance(array, list):
        raise UserError(f"{name}: expected an array of objects, found {type(array).__name__}")
    halves = spells_halves(text)
    for number, item in enumerate(array, start=1):
        yield _object(f"{name} row {number}", item, halves)


def _separated(stream: Any, name: str, delimiter: str) -> Iterator[SourceRow]:
    """CSV as RFC 4180 has it: all values are text, and an empty one counts as missing."""
    csv.field_size_limit(_LONGEST_FIELD)
    table = csv.reader((line for _, line in _lines(stream, name)), delimiter=delimiter, strict=True)
    header: list[str] = []
    begin = 1  # a quoted value may go over several lines
    try:
        for values in table:
            where, begin = f"{name} line {begin}", table.line_num + 1
            if not values:  # a blank line
                continue
            if not header:
                header = [value.strip() for value in values]
                if twice := next((column for column in header if header.count(column) > 1), None):
                    raise UserError(f"{where}: two columns are called {shown(twice)}; rename one")
                continue
            if len(values) != len(header):
                raise UserError(
                    f"{where}: {len(values)} values for the {len(header)} columns {names(header)}; a value with a "
                    'comma, tab or quote in it has to stand in "quotes"'
                )
            yield SourceRow(where, {column: value or None for column, value in zip(header, values, strict=True)})
    except csv.Error as error:
        raise UserError(f"{name} line {begin}: not valid CSV ({error})") from None


def _csv(stream: Any, name: str) -> Iterator[SourceRow]:
    return _separated(stream, name, ",")


def _tsv(stream: Any, name: str) -> Iterator[SourceRow]:
    return _separated(stream, name, "\t")


def _parquet(stream: Any, name: str) -> Iterator[SourceRow]:
    return rows_of(pq.ParquetFile(stream, page_checksum_verification=True).iter_batches(_BATCH), name)


def _arrow(stream: Any, name: str) -> Iterator[SourceRow]:
    try:
        opened = pa.ipc.open_file(stream)
    except pa.ArrowInvalid:  # as `datasets` writes it
        stream.seek(0)
        return rows_of(pa.ipc.open_stream(stream), name)
    return rows_of((opened.get_batch(i) for i in range(opened.num_record_batches)), name)


READERS: dict[str, Callable[[Any, str], Iterator[SourceRow]]] = {
    ".parquet": _parquet,
    ".jsonl": _json_rows,
    ".ndjson": _json_rows,
    ".json": _json_array,
    ".csv": _csv,
    ".tsv": _tsv,
    ".arrow": _arrow,
}
"""By a file's ending what reads its rows from a stream."""


def rows_of(batches: Any, name: str) -> Iterator[SourceRow]:
    """The rows of Arrow's record batches or tables."""
    number = 0
    for batch in batches:
        for held in held_rows(batch):
            number += 1
            yield SourceRow(f"{name} row {number}", held.values, held.mended, held.odd)


def _lines(stream: Any, name: str) -> Iterator[tuple[str, str]]:
    """The lines of a text, each with its place."""
    reader = io.BufferedReader(stream)
    for number, line in enumerate(iter(lambda: reader.readline(_LONGEST_LINE + 1), b""), start=1):
        where = f"{name} line {number}"
        if len(line) > _LONGEST_LINE:
            raise UserError(f"{where}: longer than {_LONGEST_LINE // 2**20} MiB; split it, or use Parquet")
        try:
            # Editors on Windows put a byte-order mark in front, which is no part of the first value.
            yield where, line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            byte = line[error.start]
            raise UserError(f"{where}: not UTF-8 text (byte 0x{byte:02x}); save the file as UTF-8") from None


def _row(where: str, line: str) -> SourceRow:
    try:
        item = parse_json(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not valid JSON ({error.msg} at column {error.colno})") from None
    except ValueError as error:
        raise UserError(f"{where}: cannot be read as JSON ({first_line(error)})") from None
    return _object(where, item, spells_halves(line))


def _object(where: str, item: Any, halves: bool) -> SourceRow:
    if not isinstance(item, dict):
        raise UserError(f"{where}: expected an object, found {type(item).__name__}")
    values = mended(item) if halves else item
    return SourceRow(where, values, mended=values is not item)
