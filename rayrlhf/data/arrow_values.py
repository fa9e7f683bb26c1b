"""Rows of Arrow's columns as Python's values. What Python has not, such as the year 300000, becomes its text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

_ROWS = 1000  # that are Python objects at once
_TEXTS = (pa.StringScalar, pa.LargeStringScalar, pa.StringViewScalar)


@dataclass
class Held:
    """One row."""

    values: dict[str, Any] = field(default_factory=dict)
    mended: bool = False
    """Whether U+FFFD stands for bytes that are no UTF-8."""
    odd: bool = False
    """Whether a text stands for a value that Python has not."""


def held_rows(table: pa.RecordBatch | pa.Table) -> Iterator[Held]:
    """The rows of a record batch or a table.

    Raises:
        pa.ArrowInvalid: two columns have one name, or the columns are damaged: Arrow would read beyond their ends.
    """
    names = table.schema.names
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise pa.ArrowInvalid(f"two columns are called {twice!r}; rename one")
    faults = [column for column in table.columns if not _check(column)]
    for start in range(0, table.num_rows, _ROWS):
        yield from _held(table.slice(start, _ROWS), whole=not faults)


def _check(column: pa.Array | pa.ChunkedArray) -> bool:
    """Whether a column's texts are all UTF-8."""
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        binary = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}.get(column.type)
        if binary is None:
            raise
        for chunk in column.chunks if isinstance(column, pa.ChunkedArray) else [column]:
            chunk.view(binary).validate(full=True)
        return False
    return True


def _held(table: pa.RecordBatch | pa.Table, whole: bool) -> list[Held]:
    if whole:
        try:
            return [Held(values) for values in table.to_pylist()]
        except Exception:  # Arrow raises whatever the types of Python raise
            pass
    rows = [Held() for _ in range(table.num_rows)]
    for name, column in zip(table.schema.names, table.columns, strict=True):
        for row, scalar in zip(rows, column, strict=True):
            row.values[name] = _value(scalar, row)
    return rows


def _value(scalar: pa.Scalar, row: Held) -> Any:
    """A value of `row`, in which is noted what had to be replaced."""
    try:
        return scalar.as_py()
    except Exception:  # as above
        pass
    if isinstance(scalar, _TEXTS):
        row.mended = True
        return scalar.as_buffer().to_pybytes().decode("utf-8", "replace")
    if isinstance(scalar, pa.StructScalar):
        return {name: _value(inner, row) for name, inner in scalar.items()}
    if isinstance(scalar, pa.ListScalar | pa.LargeListScalar | pa.FixedSizeListScalar):
        return [_value(inner, row) for inner in scalar.values]
    row.odd = True
    try:
        return str(scalar.cast(pa.string()).as_py())
    except pa.ArrowException:  # a time zone that nobody knows
        return str(scalar.type)
