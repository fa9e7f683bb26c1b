"""The rows of a source, before `rayrlhf.data.formats` gives them a meaning.

A source is a file or several, a directory or a hub data set. No code of a data set runs: `datasets` loads without
scripts.
"""

from __future__ import annotations

import contextlib
import glob
import re
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pyarrow.fs as fs

from rayrlhf.config_data import DatasetConfig
from rayrlhf.data import remote
from rayrlhf.data.files import READERS, DataFile, SourceRow, first_line, kind_of, rows_of
from rayrlhf.errors import UserError

Split = Literal["train", "valid", "all"]

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_URI = re.compile(r"[a-z][a-z0-9+.-]+://")
_VALIDATION_NAMES = ("validation", "valid", "val", "dev")
_SAVED = ("dataset_dict.json", "state.json")
"""What `save_to_disk` writes beside the data."""
_ASSETS = Path(__file__).parent.parent / "assets"
_BATCH = 1000  # rows of a hub data set that are read at once


@dataclass(frozen=True)
class Rows:
    """Rows that are read each time when somebody iterates over them."""

    read: Callable[[], Iterator[SourceRow]]
    content: Callable[[], list[str]]
    """Hashes of what decides the rows, for `rayrlhf.data.cache`."""

    def __iter__(self) -> Iterator[SourceRow]:
        return self.read()


@dataclass(frozen=True)
class SourceRows:
    """The rows of a source.

    `valid` is None if the source has no validation split; `rayrlhf.data.sources` then takes a share of `train`.
    """

    name: str
    train: Rows
    valid: Rows | None
    from_hub: bool = False
    """Whether others have published it, so that the user cannot mend its rows."""
    unused: tuple[str, ...] = ()
    """Its other splits."""
    left_out: tuple[str, ...] = ()
    """Files of its directory that belong to no split."""


def load_source(config: DatasetConfig) -> SourceRows:
    """Find `config.path`: `embedded:tldr`, files, a directory, or a hub name.

    Raises:
        UserError: nothing is at the path, it cannot be opened, or it lacks a split that `config` names. Further
            errors, of a file that is damaged or holds no rows, come when the rows are read.
    """
    path = config.path
    if path == "embedded:tldr":
        train, valid = (_local(_ASSETS / f"tldr/{split}.parquet") for split in ("train", "valid"))
        return SourceRows(path, _rows([train]), _rows([valid]))
    if path.startswith("embedded:"):
        raise UserError(f"{path}: no such embedded data; there is embedded:tldr")
    if _URI.match(path):
        found = remote.find(path)
        return (
            _load_remote_directory(config, found.directory)
            if found.directory
            else SourceRows(path, _rows(found.files), None)
        )
    expanded = Path(path).expanduser()
    if expanded.is_file():
        return SourceRows(path, _rows([_local(expanded)]), None)
    if expanded.is_dir():
        return _load_directory(config, expanded)
    if glob.has_magic(path):
        names = sorted(name for name in glob.glob(str(expanded), recursive=True) if Path(name).is_file())
        if not names:
            raise UserError(f"{path}: no file matches this pattern (a relative one starts at {Path.cwd()})")
        return SourceRows(path, _rows([_local(Path(name)) for name in names]), None)
    if kind_of(path)[0] or not _HUB_NAME.fullmatch(path):
        raise UserError(
            f"{path}: no such file or directory; check data.*.path (a relative path starts at {Path.cwd()})"
        )
    return _load_published(config)


def read_file(path: Path) -> list[SourceRow]:
    """All rows of one local file; see `DataFile.rows` for errors."""
    return list(_local(path).rows())


def _local(path: Path) -> DataFile:
    return DataFile(str(path), str(path.absolute()), fs.LocalFileSystem())


def _rows(files: Sequence[DataFile]) -> Rows:
    return Rows(lambda: (row for file in files for row in file.rows()), lambda: [file.content() for file in files])


def _load_directory(config: DatasetConfig, folder: Path) -> SourceRows:
    from datasets import Dataset, load_from_disk  # late: it takes seconds, and most are files

    if any((folder / name).is_file() for name in _SAVED):
        with _taken_for_a_data_set(config, folder):
            saved = load_from_disk(str(folder))
        return _of_splits(config, {"train": saved} if isinstance(saved, Dataset) else saved, _table_rows)
    splits = _names_by_split(config, folder)
    names = {each.relative_to(folder).as_posix() for each in folder.rglob("*") if each.is_file()}
    names.update(*splits.values())  # also behind links
    return _of_files(config, splits, {name: _local(folder / name) for name in names})


def _load_remote_directory(config: DatasetConfig, files: Mapping[str, DataFile]) -> SourceRows:
    """As a local one: its split names are those of a directory with the same names."""
    if any(name in files for name in _SAVED):
        splits: dict[str, list[str]] = {}
        for name in files:
            if name.endswith(".arrow"):
                splits.setdefault(name.partition("/")[0] if "/" in name else "train", []).append(name)
        return _of_files(config, splits, {name: file for name, file in files.items() if name.endswith(".arrow")})
    with tempfile.TemporaryDirectory() as folder:
        for name, file in files.items():
            copy = Path(folder, name)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read() if name == "README.md" else b"")  # where a data set may name its splits
        return _of_files(config, _names_by_split(config, Path(folder)), files)


def _names_by_split(config: DatasetConfig, folder: Path) -> dict[str, list[str]]:
    """`datasets` says which file belongs to which split, as on the hub, by their names; we read them as single ones.

    It would read them, too, but takes all for one table: two files that differ in a column, used or not, are an error
    there, whose cause and row it does not tell.
    """
    from datasets import load_dataset_builder

    with _taken_for_a_data_set(config, folder):
        splits = load_dataset_builder(str(folder), config.name).config.data_files or {}
        return {
            str(split): [Path(name).relative_to(folder.resolve()).as_posix() for name in names]
            for split, names in splits.items()
        }


@contextlib.contextmanager
def _taken_for_a_data_set(config: DatasetConfig, folder: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # `datasets` raises whatever it meets
        said = first_line(error).replace(str(folder), config.path)
        raise UserError(
            f"{config.path}: cannot be taken for a data set ({said}); put files into it that end with "
            f"{', '.join(READERS)}"
        ) from error


def _of_files(config: DatasetConfig, splits: Mapping[str, Sequence[str]], files: Mapping[str, DataFile]) -> SourceRows:
    """Files of a directory by their splits; those of no split are noted."""
    rows = {split: [files[name] for name in names if kind_of(name)[0]] for split, names in splits.items()}
    used = {name for names in splits.values() for name in names}
    hidden = (name for name in files if any(part.startswith((".", "_")) for part in name.split("/")))
    left_out = sorted({name for name in files if kind_of(name)[0]} - used - {*hidden})
    return replace(_of_splits(config, rows, lambda files, name: _rows(files)), left_out=tuple(left_out))


def _load_published(config: DatasetConfig) -> SourceRows:
    from datasets import DatasetDict, load_dataset

    try:
        data = load_dataset(config.path, config.name, revision=config.revision)
    except Exception as error:  # the hub client raises whatever its network stack does
        cause = f"; {first_line(error.__cause__)}" if error.__cause__ else ""
        raise UserError(
            f"{config.path}: cannot be loaded as a data set ({type(error).__name__}: {first_line(error)}{cause}); "
            "check the name, the network, or give a local file"
        ) from error
    if not isinstance(data, DatasetDict):
        raise UserError(f"{config.path}: expected a data set with named splits")
    return _of_splits(config, data, _table_rows, from_hub=True)


def _table_rows(data: Any, name: str) -> Rows:
    """The rows of what `datasets` has loaded."""
    files = [_local(Path(each["filename"])) for each in data.cache_files]
    # What `datasets` holds in memory has no file; its content counts as another one each time.
    return Rows(partial(_table_reader, data, name), lambda: [f.content() for f in files] or [uuid.uuid4().hex])


def _table_reader(data: Any, name: str) -> Iterator[SourceRow]:
    if not len(data):
        raise UserError(f"{name} holds no rows")
    return rows_of(data.with_format("arrow").iter(_BATCH), name)


def _of_splits(
    config: DatasetConfig, splits: Any, rows: Callable[[Any, str], Rows], from_hub: bool = False
) -> SourceRows:
    """
    Raises:
        UserError: there is no split of a name that `config` has.
    """
    there_are = f"there are: {', '.join(map(str, splits)) or 'none'}"
    train = _find_split(splits, config.train_split)
    if train is None:
        raise UserError(f"{config.path}: no split {config.train_split!r}; {there_are}; set train_split")
    valid = _find_split(splits, config.valid_split)
    if valid is None and config.valid_split not in _VALIDATION_NAMES:
        raise UserError(f"{config.path}: no split {config.valid_split!r}; {there_are}; set valid_split")
    made = [rows(splits[split], f"{config.path} {split}") for split in (train, valid) if split is not None]
    unused = tuple(str(split) for split in splits if split not in (train, valid))
    return SourceRows(config.path, made[0], made[1] if valid is not None else None, from_hub, unused)


def _find_split(names: Any, wanted: str) -> str | None:
    """Find the split of that name. The usual names of a validation split stand for each other."""
    aliases = (wanted, *_VALIDATION_NAMES) if wanted in _VALIDATION_NAMES else (wanted,)
    return next((name for name in aliases if name in names), None)
