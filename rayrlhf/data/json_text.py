"""JSON text as values that all code behind can hold.

They have no half emoji, no key twice, and are not nested deeper than Python can walk.
"""

from __future__ import annotations

import json
import re
from typing import Any

from rayrlhf.wording import shown

MAX_DEPTH = 100
"""Objects and lists inside each other. Python's own limit is near a thousand, and some of that is in use."""
_HALVES = re.compile(r"\\u[dD][89a-fA-F]")  # two of these in a row spell one character


def parse_json(text: str) -> Any:
    """The value of a JSON text, see also `mended`.

    Raises:
        json.JSONDecodeError: it is no JSON.
        ValueError: it is nested too deeply, has a number of thousands of digits, or an object with a key twice, whose
            first value Python would drop. The message is one line.
    """
    try:
        value = _DECODER.decode(text)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    if text.count("[") + text.count("{") > MAX_DEPTH and _is_deep(value):
        raise ValueError(_TOO_DEEP)
    return value


def spells_halves(text: str) -> bool:
    """Whether a JSON text may spell half an emoji, which is no character: a tokenizer would end the run there."""
    return _HALVES.search(text) is not None


def mended(value: Any) -> Any:
    """The value with U+FFFD for each half of an emoji; the same object where there is none."""
    return value if _is_text(value) else _replaced(value)


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twin = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"an object has the key {shown(twin)} twice; remove one")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_without_twins)
_TOO_DEEP = f"more than {MAX_DEPTH} objects and lists inside each other"


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        nested = [each.values() if isinstance(each, dict) else each for each in level if isinstance(each, dict | list)]
        if not nested:
            return False
        level = [inner for each in nested for inner in each]
    return True


def _is_text(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _replaced(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, dict):
        return {_replaced(key): _replaced(inner) for key, inner in value.items()}
    return [_replaced(inner) for inner in value] if isinstance(value, list) else value
