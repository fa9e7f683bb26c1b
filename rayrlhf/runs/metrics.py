"""The metrics of a run: one JSON object a line in metrics.jsonl. Trackers get the same lines (`rayrlhf.tracking`).

A line has the stage, the number of its finished steps, Unix time in seconds, and values under slash-separated names:

    {"stage": "rl", "step": 3, "time": 1700000000.0, "rl/kl": 0.5}

Beside numbers there can be text, under `"sample"`, `"note"` and `"warnings"`. JSON has neither NaN nor infinity: a
value that is not finite is written as null and named in `"non_finite"`.

A stage that restarts at step k writes k, k + 1, ... again; `read_metrics` drops what the earlier attempt wrote from
step k on. Several lines of one step add up; a name that is written twice has its last value, and warnings are all kept:

    written:  1  2  3  4   (killed, restarted from the checkpoint of step 2)   3  4  5
    read:     1  2                                                             3  4  5
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, SupportsFloat

from rayrlhf.runs.addresses import join, local_path
from rayrlhf.runs.stores import open_store

if TYPE_CHECKING:
    from rayrlhf.runs.storage import Mirror

log = logging.getLogger(__name__)

FILE = "metrics.jsonl"
WARNINGS = "warnings"
"""The name under which a line has its warnings, a list of texts."""


Watcher = Callable[[Mapping[str, Any]], Sequence[str]]
"""The warnings of a line, of one line of text each."""


def unwatched(line: Mapping[str, Any]) -> Sequence[str]:
    """The `Watcher` that warns of nothing."""
    return ()


class MetricsWriter:
    """Appends to `metrics.jsonl` of a run folder.

    Only one process writes a stage at a time. A line is one append, so that a kill can tear only the last line. In a
    store, lines appear a few seconds later, and at `close`.
    """

    def __init__(self, run_dir: str | Path) -> None:
        """`run_dir` is an absolute path or a URI."""
        self._run_dir = local_path(run_dir)
        self._run_dir.mkdir(parents=True, exist_ok=True)
        path = self._run_dir / FILE
        if store := open_store(run_dir):
            if store.exists(path):
                store.download(path)  # what processes of other nodes wrote stays in front of ours
            else:
                path.unlink(missing_ok=True)
        torn = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        if torn:  # An earlier writer was killed in its last line: it must not swallow ours.
            os.write(self._file, b"\n")
        self._mirror: Mirror | None = None
        if store:
            from rayrlhf.runs.storage import Mirror

            self._mirror = Mirror(run_dir, [FILE])

    def write(self, stage: str, step: int, values: Mapping[str, SupportsFloat], watch: Watcher = unwatched) -> None:
        """Record `values` (names to scalars: numbers, 0-d arrays or tensors) of a step, and what `watch` says of it."""
        numbers = {name: float(value) for name, value in values.items()}
        bad = {name: str(value) for name, value in numbers.items() if not math.isfinite(value)}
        line: dict[str, Any] = {"stage": stage, "step": int(step), "time": round(time.time(), 3)}
        line |= {name: None if name in bad else value for name, value in numbers.items()}
        if bad:
            line["non_finite"] = bad
            log.warning("%s step %d: not finite, written as null: %s", stage, step, bad)
        if warnings := watch(line):
            line[WARNINGS] = list(warnings)
        os.write(self._file, json.dumps(line, allow_nan=False).encode() + b"\n")

    def write_text(self, stage: str, step: int, name: str, text: str | Mapping[str, str]) -> None:
        """Record something to read: `"sample"` (prompt, reference, answer) or `"note"` (one line)."""
        line = {"stage": stage, "step": int(step), "time": round(time.time(), 3), name: text}
        os.write(self._file, json.dumps(line).encode() + b"\n")

    def warn(self, stage: str, step: int, warnings: Sequence[str]) -> None:
        """Record warnings, of one line each."""
        line = {"stage": stage, "step": int(step), "time": round(time.time(), 3), WARNINGS: list(warnings)}
        os.write(self._file, json.dumps(line).encode() + b"\n")

    def close(self) -> None:
        """Close the file; in a store, upload it first."""
        os.close(self._file)
        if self._mirror:
            self._mirror.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_lines(run_dir: str | Path, offset: int = 0) -> bytes:
    """The complete lines of a run's metrics.jsonl from byte `offset` on, however many there are by now."""
    content = _read(run_dir, offset)
    return content[: content.rfind(b"\n") + 1]


def read_metrics(run_dir: str | Path, stage: str | None = None) -> list[dict[str, Any]]:
    """The valid steps of a run: one mapping for each (stage, step), stages in order of appearance, steps rising.

    Steps that a restart superseded are dropped, and so are torn and foreign lines. Empty where nothing was written.
    """
    stages: dict[str, dict[int, dict[str, Any]]] = {}
    odd: list[int] = []
    for number, text in enumerate(_read(run_dir).split(b"\n"), start=1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            line = None
        if not _is_line(line):
            odd.append(number)
            continue
        name, step = line["stage"], line["step"]
        steps = stages.setdefault(name, {})
        for later in [s for s in steps if s > step]:
            del steps[later]
        before = steps.get(step, {})
        if WARNINGS in before and WARNINGS in line:
            line[WARNINGS] = list(dict.fromkeys([*before[WARNINGS], *line[WARNINGS]]))
        steps[step] = before | line
    if odd:
        count = "a line is" if len(odd) == 1 else f"{len(odd)} lines are"
        log.warning("%s: %s torn or foreign and left out (first: line %d)", join(run_dir, FILE), count, odd[0])
    return [line for name, steps in stages.items() if stage in (None, name) for line in steps.values()]


def _is_line(line: Any) -> bool:
    """Whether this is what `MetricsWriter` writes: a disk or an editor may have changed the file."""
    if not isinstance(line, dict) or not isinstance(line.get("stage"), str):
        return False
    for name in ("step", "time"):
        value: Any = line.get(name)
        if not _is_number(value) or not 0 <= value < _MOST or (name == "step" and type(value) is not int):
            return False
    return all(_fits(name, value) for name, value in line.items())


def _fits(name: str, value: Any) -> bool:
    """Names with a slash are numbers, others may be texts."""
    if check := _LISTS.get(name):
        return check(value)
    return _is_number(value, True) or ("/" not in name and (_is_text(value) or _are_texts(value)))


_MOST = 10**11
"""More than any step has, and than Unix time in seconds has before the year 5000."""


def _is_number(value: Any, missing: bool = False) -> bool:
    """Whether a value is a finite number; null counts as one where it may be missing."""
    if value is None:
        return missing
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _are_texts(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_text, value.values()))


_LISTS: dict[str, Callable[[Any], bool]] = {
    "sample": _are_texts,
    "non_finite": _are_texts,
    WARNINGS: lambda value: isinstance(value, list) and all(map(_is_text, value)),
}
"""By name what a line has that is neither a number nor a text."""


def _read(run_dir: str | Path, offset: int = 0) -> bytes:
    if store := open_store(run_dir):
        return store.read_from(FILE, offset)
    path = Path(run_dir) / FILE
    if not path.exists():
        return b""
    with path.open("rb") as file:
        file.seek(offset)
        return file.read()
