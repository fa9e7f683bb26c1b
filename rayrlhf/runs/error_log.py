"""`errors.log` of a run: the whole of what the command tells in one line, for those who look for the cause.

An entry has the line, versions, the last metrics, the config, and a traceback of every process that was involved.
Secrets are taken out, see `rayrlhf.redaction`. Only the process that holds the run's lock writes it.
"""

from __future__ import annotations

import calendar
import json
import time
import traceback
from collections.abc import Mapping
from typing import Any

from rayrlhf.errors import without_colour
from rayrlhf.failures import note_log
from rayrlhf.redaction import redacted
from rayrlhf.runs.folder import RunFolder
from rayrlhf.runs.metrics import read_metrics
from rayrlhf.runs.versions import versions

HEAD = "==== "
"""Begins the first line of an entry."""
RAY = "Ray's session: "
"""Begins the line that says where Ray's own logs are."""
_MOMENT = "%Y-%m-%dT%H:%M:%SZ"
"""How an entry says when it was written, in UTC."""
_SAMPLES = ("sample", "answers")
"""What a line of metrics may have of the user's texts."""
_METRICS = 3
"""The last lines of metrics that an entry has."""


def note(run: RunFolder, line: str, whole: str = "") -> None:
    """Add an entry of one line, with the whole of it if there is more."""
    _append(run, line, without_colour(whole))


def record(run: RunFolder, error: BaseException, line: str, facts: str = "") -> None:
    """Add an entry about an error that ends the run, and note on the error where the log is.

    Args:
        line: what the user is told.
        facts: further lines, such as where Ray's own logs are.

    Raises:
        OSError: it cannot be written, as on a full disk.
    """
    parts = [facts, "versions: " + ", ".join(f"{name} {version}" for name, version in versions().items())]
    lines = [json.dumps(without_samples(line)) for line in read_metrics(run.address)[-_METRICS:]]
    parts.append("\n".join(["last metrics:", *(lines or ["none"])]))
    parts.append("config:\n" + (run.read(run.config) or b"none").decode(errors="replace"))
    parts.append(without_colour("".join(traceback.format_exception(error))))
    _append(run, line, "\n".join(part.rstrip() for part in parts if part))
    note_log(error, run.address_of(run.errors))


def without_samples(line: Mapping[str, Any]) -> dict[str, Any]:
    """A line of metrics without the user's texts."""
    return {name: value for name, value in line.items() if name not in _SAMPLES}


def entries(text: str) -> list[str]:
    """The entries of a log, oldest first."""
    return [HEAD + entry for entry in ("\n" + text).split("\n" + HEAD)[1:]]


def moment_of(entry: str) -> tuple[float, str]:
    """When an entry was written (Unix time, whole seconds, rounded up), and its line."""
    moment, line = entry.splitlines()[0].removeprefix(HEAD).split(" ", 1)
    return calendar.timegm(time.strptime(moment, _MOMENT)) + 1.0, line


def _append(run: RunFolder, line: str, whole: str) -> None:
    moment = time.strftime(_MOMENT, time.gmtime())
    text = redacted(f"{HEAD}{moment} {line}\n{whole.rstrip()}\n" if whole else f"{HEAD}{moment} {line}\n")
    with run.errors.open("a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)
    run.upload(run.errors)
