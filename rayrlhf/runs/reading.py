"""Files of a run's folder that the program wrote itself, read back: whole and in their shape, or named as damaged.

A disk, a copy or an editor may have changed them since. Parquet files carry a checksum of every page; of JSON only the
shape can be checked.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from rayrlhf.errors import UserError
from rayrlhf.wording import in_a_line, shown

if TYPE_CHECKING:
    import pyarrow as pa

_EVALUATED = "delete evaluation.json, and the stage evaluate writes both anew"
_TRAINED = "copy it back, or delete the directory reward_model to train that again"
_REMEDIES = {
    "evaluation.json": _EVALUATED,
    "samples.parquet": _EVALUATED,
    "comparisons.parquet": "copy it back, or delete it to collect again",
    "reward_model.json": _TRAINED,
    "heldout_pairs.parquet": _TRAINED,
    "contents.json": "delete it: the files that the config names are then hashed again",
    "outputs.json": "delete it to go on without knowing whether what finished stages have written is whole",
    "shared.json": "delete it: the run is then compared with that of `from` again",
    "tracking.json": "delete it: trackers then get all lines again",
    "rounds.json": 'write {"begun": N} into it, where N is the number of round-N directories',
}
"""What to do about a damaged file, by its name."""
_ELSE = "copy it back, or delete it"
_FAULTS = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, OSError, MemoryError)
"""What reading raises of bytes that are not what was written."""


@contextlib.contextmanager
def sound(address: str) -> Iterator[None]:
    """A block that reads a file and makes sense of it; where it cannot, the file at `address` is damaged.

    Raises:
        UserError: it is; the message says what to do.
    """
    try:
        yield
    except _FAULTS as error:
        raise _damaged(address, error) from None


def read_json(content: bytes, address: str, shape: Any = dict[str, Any]) -> Any:
    """What a JSON file holds.

    Args:
        content: of the file.
        address: the file's, for the error.
        shape: a type that pydantic can check. Numbers have to be finite.

    Raises:
        UserError: it is damaged.
    """
    with sound(address):
        found = json.loads(content, parse_constant=_no_number)
        TypeAdapter(shape).validate_json(content, strict=True)
        return found


def read_json_lines(content: bytes, address: str, shape: Any = dict[str, Any]) -> list[Any]:
    """As `read_json`, of a file with a value a line."""
    return [read_json(line, address, shape) for line in content.splitlines() if line.strip()]


def read_table(content: bytes, address: str, *columns: str) -> pa.Table:
    """The table of a Parquet file, which has at least these columns.

    Raises:
        UserError: it is damaged.
    """
    import pyarrow as pa  # late: most commands read no table
    import pyarrow.parquet as pq

    with sound(address):
        try:
            table = pq.read_table(pa.BufferReader(content), page_checksum_verification=True)
        except pa.ArrowException as error:
            raise ValueError(str(error)) from None
        if missing := [name for name in columns if table.column_names.count(name) != 1]:
            raise ValueError(f"no column {missing[0]}")
        table.validate(full=True)
        return table


def read_rows(content: bytes, address: str, *columns: str) -> list[dict[str, Any]]:
    """The rows of a Parquet file; see `read_table`."""
    with sound(address):
        return list(read_table(content, address, *columns).to_pylist())


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def _damaged(address: str, error: BaseException) -> UserError:
    said = str(error).strip() or type(error).__name__
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        said = f"{'.'.join(map(str, first['loc'])) or 'it'}: {first['msg']}"
    elif isinstance(error, LookupError):
        said = f"{shown(error.args[0] if error.args else '')} is missing"
    remedy = _REMEDIES.get(address.rsplit("/", 1)[-1], _ELSE)
    return UserError(in_a_line(f"{address}: is damaged ({in_a_line(said)[:100]}); {remedy}"))
