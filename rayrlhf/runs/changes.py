"""What differs between two configs and what they name, and which stages a difference goes into."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rayrlhf.runs.contents import Contents, hashes
from rayrlhf.runs.stages import stages_from

_FREE_KEYS = {"name", "runs_dir", "from", "tracking", "alarms", "resources"}
"""Top-level keys that do not change results."""
MICRO_BATCH = "micro_batch_tokens"
"""The key of a stage's section that does not: a run may go on with another value, as where memory was too small."""
_SHOWN = 3
"""A sentence names so many changes, and counts the others."""


@dataclass(frozen=True)
class Change:
    """One key whose value, or whose file's content, is another one."""

    key: str
    words: str
    content: bool = False

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages whose results it changes."""
        parts = self.key.split(".")
        return () if parts[0] in _FREE_KEYS or parts[-1] == MICRO_BATCH else stages_from(self.key)


def config_changes(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[Change]:
    """The keys whose values differ, in the order of `new`; both are dumps of whole configs."""
    found: list[Change] = []
    for key in [*new, *(k for k in old if k not in new)]:
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found += config_changes(before, after, f"{prefix}{key}.")
        elif before != after:
            found.append(Change(prefix + key, f"{prefix}{key} was {before!r} and is now {after!r}"))
    return found


def content_changes(old: Contents, new: Contents) -> list[Change]:
    """The keys that name other contents than before. What is unknown on one side, or gone, is no change."""
    found = []
    for key in [key for key in new if key in old]:
        before, after = hashes(old, key), hashes(new, key)
        if before != after:
            names = sorted({*before, *after}, key=lambda name: (before.get(name) == after.get(name), name))
            path = new[key]["path"]
            what = path if list(after) == [path.rpartition("/")[2]] else f"{path}/{names[0]}"
            found.append(Change(key, f"the content of {what} ({key}) has changed", content=True))
    return found


def sentence(changes: Iterable[Change]) -> str:
    """The first changes in words, and the number of the others."""
    words = [change.words for change in changes]
    more = f" (and {len(words) - _SHOWN} more)" if len(words) > _SHOWN else ""
    return ", ".join(words[:_SHOWN]) + more
