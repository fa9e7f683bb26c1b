"""Records in an Arrow file that is mapped into memory: each is made when it is asked for, and none stays.

So a million records take no more memory than the few that somebody looks at; the file's pages are the system's cache.
The file has batches of `ROWS` records, the last one fewer, and a column for each field of the record.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar, overload
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rayrlhf.data.records import Comparison, Demonstration, LabelledAnswer, Message, Prompt

R = TypeVar("R", bound=Prompt | Comparison | LabelledAnswer)
ROWS = 1024

_IDS = pa.list_(pa.int32())
_TOKENS: list[tuple[str, Any]] = [("tokens", pa.int32()), ("ids", _IDS), ("response_ids", pa.list_(_IDS))]
_PROMPT = pa.schema(
    [
        ("id", pa.string()),
        ("text", pa.string()),
        ("reference", pa.string()),
        ("title", pa.string()),
        ("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("metadata", pa.binary()),
        ("group", pa.string()),
        *_TOKENS,
    ]
)
_COMPARISON = pa.schema(
    [
        ("id", pa.string()),
        ("prompt", pa.string()),
        ("responses", pa.list_(pa.string())),
        ("source", pa.string()),
        ("scores", pa.list_(pa.float64())),
        *_TOKENS,
    ]
)
_LABELLED = pa.schema(
    [
        ("id", pa.string()),
        ("prompt", pa.string()),
        ("response", pa.string()),
        ("good", pa.bool_()),
        ("source", pa.string()),
        *_TOKENS,
    ]
)
_SCHEMAS: dict[type[Any], pa.Schema] = {
    Prompt: _PROMPT,
    Demonstration: _PROMPT,
    Comparison: _COMPARISON,
    LabelledAnswer: _LABELLED,
}


class Key(NamedTuple):
    """What a record's split follows from, without the record."""

    place: int
    """Of the record in its file."""
    id: str
    split_key: str
    """As in `Prompt`."""


class Records(Sequence[R], Generic[R]):
    """Some records of a file, in an order of their own. To pickle it is to pickle a list of them."""

    def __init__(self, kind: type[R], file: pa.ipc.RecordBatchFileReader, places: NDArray[np.int64]) -> None:
        """
        Args:
            kind: the records' class.
            file: which `write_records` wrote.
            places: [n] of the records in the file, counted from 0.
        """
        self._kind, self._file, self._places = kind, file, places

    @classmethod
    def open(cls, kind: type[R], path: Path) -> Records[R]:
        """All records of a file, which may be deleted afterwards.

        Raises:
            pa.ArrowInvalid: it is damaged.
            OSError: it cannot be read.
        """
        file = pa.ipc.open_file(pa.memory_map(str(path)))
        if not file.schema.equals(_SCHEMAS[kind]):
            raise pa.ArrowInvalid(f"{path} has other columns")
        batches = file.num_record_batches
        count = (batches - 1) * ROWS + file.get_batch(batches - 1).num_rows if batches else 0
        return cls(kind, file, np.arange(count))

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, at: int) -> R: ...
    @overload
    def __getitem__(self, at: slice) -> Records[R]: ...
    def __getitem__(self, at: int | slice) -> R | Records[R]:
        if isinstance(at, slice):
            return Records(self._kind, self._file, self._places[at])
        place = int(self._places[at])
        return self._made(self._file.get_batch(place // ROWS).slice(place % ROWS, 1))[0]

    def __iter__(self) -> Iterator[R]:
        for batch in self._batches():
            yield from self._made(batch)

    def __reduce__(self) -> Any:
        return list, (list(self),)

    def at(self, keys: Iterable[Key]) -> Records[R]:
        """The records of these keys, in their order."""
        return Records(self._kind, self._file, np.array([key.place for key in keys], np.int64))

    def column(self, name: str) -> Iterator[Any]:
        """One field of every record, without the others."""
        for batch in self._batches(name):
            yield from _values(name, batch.column(0))

    @property
    def keys(self) -> list[Key]:
        """A key for each record; not of comparisons and labelled answers, which are split as their publisher did."""
        groups = zip(self._places.tolist(), self.column("id"), self.column("group"), strict=True)
        return [Key(place, id, group or id) for place, id, group in groups]

    def lengths(self) -> NDArray[np.int64]:
        """The lengths of all responses of all records, whole, in tokens."""
        found = [batch.column(0).flatten().value_lengths().to_numpy() for batch in self._batches("response_ids")]
        return np.concatenate([np.empty(0, np.int64), *found])

    def _batches(self, *columns: str) -> Iterator[pa.RecordBatch]:
        """The records in pieces, each of one batch of the file."""
        numbers = self._places // ROWS
        ends = [*np.flatnonzero(np.diff(numbers)) + 1, len(numbers)] if len(numbers) else []
        start = 0
        for end in ends:
            batch = self._file.get_batch(int(numbers[start]))
            own = self._places[start:end] % ROWS
            if columns:
                batch = batch.select(list(columns))
            # A whole batch needs no copy.
            yield batch if len(own) == batch.num_rows and np.all(np.diff(own) == 1) else batch.take(pa.array(own))
            start = int(end)

    def _made(self, batch: pa.RecordBatch) -> list[R]:
        names = batch.schema.names
        columns = [_values(name, batch.column(name)) for name in names]
        return [self._kind(**dict(zip(names, values, strict=True))) for values in zip(*columns, strict=True)]


def write_records(kind: type[R], records: Iterable[R], path: Path) -> int:
    """Write a file of records; returns their number.

    Raises:
        pickle.UnpicklingError: the metadata of one holds an object that is no value of a data file.
    """
    schema, waiting, written = _SCHEMAS[kind], list[R](), 0
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:

        def write() -> None:
            nonlocal written
            rows = [{name: _stored(name, getattr(record, name)) for name in schema.names} for record in waiting]
            writer.write_batch(pa.RecordBatch.from_pylist(rows, schema))
            written += len(waiting)
            waiting.clear()

        for record in records:
            waiting.append(record)
            if len(waiting) == ROWS:
                write()
        if waiting:
            write()
    return written


# ---- fields in Arrow


def _stored(name: str, value: Any) -> Any:
    match name:
        case "messages":
            return [message._asdict() for message in value]
        case "metadata":
            return _packed(dict(value)) if value else None
        case _:
            return value


def _values(name: str, column: pa.Array) -> list[Any]:
    """The values of a field, of which Arrow has a column."""
    match name:
        case "ids" | "response_ids":
            return _tuples(column)
        case "messages":
            return [tuple(Message(**message) for message in each) for each in column.to_pylist()]
        case "metadata":
            return [_unpacked(each) if each else {} for each in column.to_pylist()]
        case "responses" | "scores":
            return [None if each is None else tuple(each) for each in column.to_pylist()]
        case _:
            return list(column.to_pylist())


def _tuples(column: pa.Array) -> list[tuple[Any, ...]]:
    """Lists of numbers, or lists of these. Arrow's own `to_pylist` is much slower: it first makes a scalar of each."""
    inner = column.flatten()
    found = _tuples(inner) if pa.types.is_list(inner.type) else inner.to_numpy().tolist()
    ends = np.cumsum(column.value_lengths().to_numpy()).tolist()
    return [tuple(found[start:end]) for start, end in zip([0, *ends], ends, strict=False)]


# ---- metadata: any value that a data file can hold, with its type, which Arrow's columns would not keep

_VALUES = {
    ("datetime", "date"),
    ("datetime", "datetime"),
    ("datetime", "time"),
    ("datetime", "timedelta"),
    ("datetime", "timezone"),
    ("decimal", "Decimal"),
    ("pandas._libs.tslibs.timedeltas", "_timedelta_unpickle"),
    ("pandas._libs.tslibs.timestamps", "_unpickle_timestamp"),
    ("uuid", "UUID"),
    ("zoneinfo", "ZoneInfo"),
}
"""What makes the values that are no plain ones. Nothing else is unpickled: a cache may be shared with others."""


class _Packing(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        # Its own way calls `getattr`, with which anything could be reached.
        return (ZoneInfo, (value.key,)) if isinstance(value, ZoneInfo) else NotImplemented


class _Unpacking(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _VALUES:
            raise pickle.UnpicklingError(f"a value of the type {module}.{name}")
        return super().find_class(module, name)


def _packed(values: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    _Packing(buffer, protocol=5).dump(values)
    _unpacked(buffer.getvalue())
    return buffer.getvalue()


def _unpacked(packed: bytes) -> Any:
    return _Unpacking(io.BytesIO(packed)).load()
