"""Wrong values, long lists of names and long messages, as much of them as has room in one line."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

LINE = 300
"""Characters of a line that says what is wrong."""
_VALUE, _NAMES = 60, 80
"""Characters of a value, and of names, within such a line."""


def shown(value: Any) -> str:
    """A value that is wrong, as much of it as has room in a line.

    >>> shown("a" * 100)
    "'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa…"
    """
    text = " ".join(repr(value[: _VALUE + 1] if isinstance(value, str) else value).split())
    return text if len(text) <= _VALUE else f"{text[:_VALUE]}…"


def names(there_are: Iterable[Any]) -> str:
    """Names with commas between, as many as have room in a line, and how many there are besides.

    >>> names(["a", "b"]), names([])
    ('a, b', 'none')
    """
    given = [_plain(str(name)) for name in there_are]
    told, size = 0, 0
    for name in given:
        size += len(name) + 2
        if told and size > _NAMES:
            break
        told += 1
    more = f" and {len(given) - told} more" if told < len(given) else ""
    return ", ".join(name if len(name) <= _NAMES else f"{name[:_NAMES]}…" for name in given[:told]) + more or "none"


def in_a_line(text: str) -> str:
    """Text of any length as one line of at most `LINE` characters: its beginning, which says where, and its end, which
    says how to mend it.
    """
    text = _plain(text)
    end = LINE // 3
    return text if len(text) <= LINE else f"{text[: LINE - end - 3]} … {text[-end:]}"


def _plain(text: str) -> str:
    """Text in one line, of characters that can be seen."""
    return "".join(each if each.isprintable() else "\ufffd" for each in " ".join(text.split()))
