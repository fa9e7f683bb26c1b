"""What is in the files that a config names: a path in the config stands for its content.

`contents.json` of a run folder has, by dotted key, the hash of every file that the key names:

    {"data.demonstrations.path": {"path": "/me/posts.jsonl", "files": {"posts.jsonl": {"blake2b": "5f0c...", ...}}}}

So a file that was replaced is noticed as a changed value is (`rayrlhf.runs.changes`). Names on the hub, models and data
of the package, and URIs have no entry.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from rayrlhf.config import Config
from rayrlhf.config_file import dump_config
from rayrlhf.files import fingerprint
from rayrlhf.runs.reading import read_json
from rayrlhf.terminal import say

Contents = dict[str, dict[str, Any]]
"""Dotted key to `path` and `files`; these are names to `bytes`, `blake2b` and `stat`."""
_KEYS = ("path", "from", "value_from", "reference_from", "previous_from")
"""The last part of keys that name files."""
_NOTICE_BYTES = 4 * 2**30
"""Reading more than that is said, since it takes seconds."""
_SETTLED_NS = 2 * 10**9
"""A file that changed so recently is hashed again: a file system's clock may be too slow to show one more change."""


def read_contents(config: Config, models: Mapping[str, str], known: Contents) -> Contents:
    """The contents of all files and directories that the config names.

    Args:
        config: of a run. Its own `from`, another run's folder, is no content: what is taken over is compared itself.
        models: where the models of the keys `from` are, see `rayrlhf.runs.starts.find_models`.
        known: contents read before. A file is read again only if its inode, size or times differ from then.
    """
    found = {}
    for key, value in _named(dump_config(config)):
        if key == "from":
            continue
        path = _existing(models.get(key, value))
        if path is not None:
            before = known.get(key, {}).get("files", {})
            found[key] = {"path": str(path), "files": _read(key, path, before)}
    return found


class _File(BaseModel):
    bytes: int
    blake2b: str
    stat: list[int] | None = None


class _Named(BaseModel):
    path: str
    files: dict[str, _File]


def parse_contents(text: bytes | None, address: str) -> Contents:
    """What `contents.json` holds; nothing of a run folder of an earlier version, which has none.

    Raises:
        UserError: it is damaged.
    """
    return {} if text is None else read_json(text, address, dict[str, _Named])


def hashes(contents: Contents, key: str) -> dict[str, str]:
    """File names to hashes of what a key names."""
    return {name: entry["blake2b"] for name, entry in contents[key]["files"].items()}


def _named(tree: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """The dotted keys of texts that may name files, with their values."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            yield from _named(value, f"{key}.{name}" if key else str(name))
    elif isinstance(tree, list):
        for number, value in enumerate(tree):
            yield from _named(value, f"{key}[{number}]")
    elif isinstance(tree, str) and key.rpartition(".")[2] in _KEYS:
        yield key, tree


def _existing(value: str) -> Path | None:
    """The file or directory of a value such as `data.jsonl`, `model/` or `reward.py:score`; None if there is none."""
    file, _, name = value.rpartition(":")
    path = Path(file if name and file.endswith(".py") else value).expanduser()
    return path.absolute() if path.exists() else None


def _read(key: str, path: Path, before: Mapping[str, Any]) -> dict[str, Any]:
    # Hidden files are no data, and a hub's cache keeps its locks in them.
    files = {path.name: path} if path.is_file() else {
        each.relative_to(path).as_posix(): each
        for each in sorted(path.rglob("*"))
        if each.is_file() and not any(part.startswith(".") for part in each.relative_to(path).parts)
    }  # fmt: skip
    stats = {name: _stat(file) for name, file in files.items()}
    unread = [name for name in files if stats[name] is None or before.get(name, {}).get("stat") != stats[name]]
    if (size := sum(files[name].stat().st_size for name in unread)) > _NOTICE_BYTES:
        say(f"{key}: reading {size / 2**30:.0f} GiB of {path} to know them again")
    return {
        name: {**fingerprint(file), "stat": stats[name]} if name in unread else dict(before[name])
        for name, file in files.items()
    }


def _stat(path: Path) -> list[int] | None:
    """What changes with a file's content; None of a file that has just changed."""
    stat = path.stat()
    if time.time_ns() - stat.st_ctime_ns < _SETTLED_NS:
        return None
    return [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
