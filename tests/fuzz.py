"""What fuzzers share: how many cases there are, damage to files, and what a command may say of bad input."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jobs.guard import guarded

CASES = pytest.mark.parametrize("cases", [25, pytest.param(1000, marks=pytest.mark.long)])
"""A few cases for every change; the 1,000 take minutes."""
_GROWTH = 300 * 2**20
"""Bytes by which a process may grow over the later three quarters of many cases."""


def try_cases(cases: int, check: Callable[[Any], None], strategy: st.SearchStrategy[Any]) -> None:
    """Check so many values of a strategy, the same in every run; of many, that the process does not grow with them."""
    sizes: list[int] = []

    def counted(case: Any) -> None:
        check(case)
        sizes.append(resident())

    quick = settings(max_examples=cases, suppress_health_check=list(HealthCheck))
    quick(given(strategy)(counted))()
    if cases >= 1000:
        assert sizes[-1] - sizes[len(sizes) // 4] < _GROWTH


def said_of(action: Callable[[], Any], capsys: pytest.CaptureFixture[str]) -> str | None:
    """What a command prints that does `action`: one line if the input is wrong, None if it is not.

    Any exception but `UserError` passes through, as in a command.
    """

    def command() -> None:
        action()

    capsys.readouterr()
    code = guarded(command)
    said = capsys.readouterr().err
    errors = [line for line in said.splitlines() if not line.startswith("WARNING ")]
    if code == 0:
        assert not errors
        return None
    assert code == 2 and len(errors) == 1 and said.endswith("\n"), said
    assert len(errors[0]) <= 300 and errors[0].isprintable(), said
    return errors[0]


def resident() -> int:
    """Bytes of memory that this process has."""
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def damaged(content: bytes, draw: Any) -> bytes:
    """A file's content cut short, with flipped bits, with foreign bytes, with a hole, or empty."""
    place = draw(st.integers(0, max(len(content) - 1, 0)))
    match draw(st.sampled_from(["cut", "flip", "insert", "hole", "empty", "zeros"])):
        case "cut":
            return content[:place]
        case "flip":
            bits = draw(st.lists(st.tuples(st.integers(0, max(len(content) - 1, 0)), st.integers(0, 7)), min_size=1))
            changed = bytearray(content)
            for byte, bit in bits if content else ():
                changed[byte] ^= 1 << bit
            return bytes(changed)
        case "insert":
            return content[:place] + draw(st.binary(min_size=1, max_size=20)) + content[place:]
        case "hole":
            return content[:place] + content[place + draw(st.integers(1, 50)) :]
        case "zeros":  # what some file systems leave after a power cut
            return content[:place] + bytes(len(content) - place)
        case _:
            return b""


ODD: tuple[Any, ...] = (None, True, -1, 0, 10**400, 1e308, float("nan"), "", "x", "0", [], [None], {}, {"x": None})
"""Values in the place of others."""


def changed_json(content: bytes, draw: Any) -> bytes:
    """JSON, or a line of JSON Lines, in which a value is another one, is gone, or has another key."""
    lines = content.split(b"\n")
    whole = len(lines) > 2 and not content.lstrip().startswith(b"{\n")
    place = draw(st.integers(0, len(lines) - 1)) if whole else 0
    text = lines[place] if whole else content
    tree = json.loads(text) if text.strip() else {}
    node = tree
    while True:
        keys: list[Any] = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            return content
        key = draw(st.sampled_from(keys))
        if isinstance(node[key], dict | list) and node[key] and draw(st.booleans()):
            node = node[key]
            continue
        match draw(st.sampled_from(["value", "gone", "key"])):
            case "value":
                node[key] = draw(st.sampled_from(ODD))
            case "key" if isinstance(node, dict):
                node[f"{key}x"] = node.pop(key)
            case _:
                del node[key]
        break
    changed = json.dumps(tree).encode()
    return b"\n".join([*lines[:place], changed, *lines[place + 1 :]]) if whole else changed


def changed_table(content: bytes, draw: Any) -> bytes:
    """A Parquet file in which a column is gone, has nothing in it, or other values."""
    table = pq.read_table(pa.BufferReader(content))
    place = draw(st.integers(0, table.num_columns - 1))
    name = table.column_names[place]
    other = draw(st.sampled_from(["gone", "null", "number", "text", "list", "empty"]))
    values = {"null": None, "number": 7, "text": "x", "list": [7]}
    if other == "empty":
        table = table.slice(0, 0)
    elif other == "gone":
        table = table.remove_column(place)
    else:
        kind = table.schema.field(place).type if other == "null" else None
        table = table.set_column(place, name, pa.array([values[other]] * table.num_rows, kind))
    stream = io.BytesIO()
    pq.write_table(table, stream)
    return stream.getvalue()
