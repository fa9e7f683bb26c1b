"""The rows of a file, a directory or a hub data set, before `rayrlhf.data.formats` gives them a meaning.

Nothing is unpickled and no code of a data set runs: only JSON, Parquet and data that `datasets` loads without scripts.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from rayrlhf.config import DatasetConfig
from rayrlhf.errors import UserError

Split = Literal["train", "valid", "all"]

_FILE_KINDS = (".parquet", ".jsonl", ".jsonl.gz", ".json")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_VALIDATION_NAMES = ("validation", "valid", "val", "dev")
_ASSETS = Path(__file__).parent.parent / "assets"


@dataclass(frozen=True)
class SourceRow:
    """One row and its place, so that every error can name it."""

    where: str
    """`FILE row 3` (rows of Parquet) or `FILE line 3` (JSONL), counted from 1."""
    values: dict[str, Any]

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
            raise UserError(f"{self.where}: no column {column!r}; there are: {', '.join(self.values) or 'none'}")
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

    def other_than(self, *columns: str) -> dict[str, Any]:
        """The values of all columns but these."""
        return {column: value for column, value in self.values.items() if column not in columns}


@dataclass(frozen=True)
class SourceRows:
    """The rows of a source.

    `valid` is None if the source has no validation split; `read_demonstrations` then takes a share of `train`.
    """

    name: str
    train: list[SourceRow]
    valid: list[SourceRow] | None


def load_source(config: DatasetConfig) -> SourceRows:
    """Read `config.path`: `embedded:tldr`, a file, a directory that `datasets` can load, or a hub name.

    Raises:
        UserError: nothing is at the path, it cannot be read, it is empty, or it lacks a split that `config` names.
    """
    if config.path == "embedded:tldr":
        return SourceRows(
            config.path, read_file(_ASSETS / "tldr/train.parquet"), read_file(_ASSETS / "tldr/valid.parquet")
        )
    if config.path.startswith("embedded:"):
        raise UserError(f"{config.path}: no such embedded data; there is embedded:tldr")
    path = Path(config.path).expanduser()
    if path.is_file():
        return SourceRows(config.path, read_file(path), None)
    looks_like_a_file = config.path.endswith(_FILE_KINDS) or not _HUB_NAME.fullmatch(config.path)
    if not path.is_dir() and looks_like_a_file:
        raise UserError(
            f"{config.path}: no such file or directory; check data.*.path (a relative path starts at {Path.cwd()})"
        )
    return _load_splits(config)


def read_file(path: Path) -> list[SourceRow]:
    """All rows of one .parquet, .jsonl, .jsonl.gz or .json file; a .json file holds an array of objects.

    Raises:
        UserError: another kind of file, no such file, an unreadable or an empty one.
    """
    if not path.name.endswith(_FILE_KINDS):
        raise UserError(f"{path}: unknown kind of file; use {', '.join(_FILE_KINDS)}")
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        rows = list(_parquet_rows(path) if path.suffix == ".parquet" else _json_rows(path))
    except (pa.ArrowException, OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({_first_line(error)})") from None
    if not rows:
        raise UserError(f"{path}: the file holds no rows")
    return rows


def _parquet_rows(path: Path) -> Iterator[SourceRow]:
    for number, values in enumerate(pq.read_table(path).to_pylist(), start=1):
        yield SourceRow(f"{path} row {number}", values)


def _json_rows(path: Path) -> Iterator[SourceRow]:
    raw = path.read_bytes()
    # utf-8-sig: editors on Windows put a byte-order mark in front, which is no part of the first value.
    text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8-sig")
    if path.suffix == ".json":
        try:
            array = json.loads(text) if text.strip() else []
        except json.JSONDecodeError as error:
            raise UserError(f"{path}: not valid JSON ({error}); one object a line belongs into a .jsonl file") from None
        if not isinstance(array, list):
            raise UserError(f"{path}: expected an array of objects, found {type(array).__name__}")
        for number, item in enumerate(array, start=1):
            yield SourceRow(f"{path} row {number}", _object(item, f"{path} row {number}"))
    else:
        for number, values in json_lines(text, path):
            yield SourceRow(f"{path} line {number}", values)


def json_lines(text: str, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a text with one a line, each with the number of its line; blank lines are left out.

    Args:
        text: the content of a JSON Lines file.
        path: its name in errors.

    Raises:
        UserError: a line that is not JSON, or not an object.
    """
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines() would also cut inside JSON strings
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path} line {number}: not valid JSON ({error.msg} at column {error.colno})") from None
        yield number, _object(item, f"{path} line {number}")


def _object(item: Any, where: str) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise UserError(f"{where}: expected an object, found {type(item).__name__}")
    return item


def _load_splits(config: DatasetConfig) -> SourceRows:
    from datasets import DatasetDict, load_dataset  # imported late: it takes seconds, and most sources are files

    folder = Path(config.path).expanduser()
    try:
        data = load_dataset(str(folder) if folder.is_dir() else config.path)
    except Exception as error:  # the hub client raises whatever its network stack does
        raise UserError(
            f"{config.path}: cannot be loaded as a data set ({type(error).__name__}: {_first_line(error)}); "
            "check the name, the network, or give a local file"
        ) from error
    if not isinstance(data, DatasetDict):
        raise UserError(f"{config.path}: expected a data set with named splits")
    there_are = f"there are: {', '.join(map(str, data))}"
    train = _find_split(data, config.train_split)
    if train is None:
        raise UserError(f"{config.path}: no split {config.train_split!r}; {there_are}; set train_split")
    valid = _find_split(data, config.valid_split)
    if valid is None and config.valid_split not in _VALIDATION_NAMES:
        raise UserError(f"{config.path}: no split {config.valid_split!r}; {there_are}; set valid_split")
    rows = {
        name: [
            SourceRow(f"{config.path} {name} row {n}", values) for n, values in enumerate(data[name].to_list(), start=1)
        ]
        for name in (train, valid)
        if name is not None
    }
    for name, found in rows.items():
        if not found:
            raise UserError(f"{config.path}: split {name!r} holds no rows")
    return SourceRows(config.path, rows[train], rows[valid] if valid is not None else None)


def _find_split(names: Any, wanted: str) -> str | None:
    """Find the split of that name. The usual names of a validation split stand for each other."""
    aliases = (wanted, *_VALIDATION_NAMES) if wanted in _VALIDATION_NAMES else (wanted,)
    return next((name for name in aliases if name in names), None)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
