"""The weights that lie in a model's directory, by the headers of its safetensors files: no weight is read."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from rayrlhf.errors import UserError, one_line

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def stored_names(directory: Path, path: str) -> set[str]:
    """The names of the weights, after a look at every file that transformers would load.

    Args:
        directory: of the model.
        path: how the user calls it.

    Raises:
        UserError: there are no weights, or a download was not finished: a file is missing or cut short.
    """
    again = "download or copy the model again"
    if (directory / SINGLE).is_file():
        return _names(directory / SINGLE, path, again)
    if not (directory / INDEX).is_file():
        parts = sorted(each.name for each in directory.glob("*.safetensors"))
        if not parts:
            raise UserError(f"model {path!r}: no *.safetensors file; convert the weights with save_pretrained first")
        raise UserError(f"model {path!r}: there is {parts[0]}, and neither {SINGLE} nor {INDEX}; {again}")
    try:
        listed: dict[str, str] = json.loads((directory / INDEX).read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError):  # a JSON or UTF-8 error is a ValueError
        raise UserError(f"model {path!r}: {INDEX} cannot be read; {again}") from None
    for file in sorted(set(listed.values())):
        if not (directory / file).is_file():
            raise UserError(f"model {path!r}: {file} is missing, which {INDEX} names; {again}")
        missing = {name for name, own in listed.items() if own == file} - _names(directory / file, path, again)
        if missing:
            raise UserError(f"model {path!r}: {file} lacks {min(missing)!r}, which {INDEX} names in it; {again}")
    return set(listed)


def _names(file: Path, path: str, again: str) -> set[str]:
    try:
        with safe_open(file, "pt") as opened:  # which compares the header with the size of the file
            return set(opened.keys())
    except (SafetensorError, OSError) as error:
        raise UserError(f"model {path!r}: {file.name} is cut short or damaged ({one_line(error)}); {again}") from None
