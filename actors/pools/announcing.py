"""What a process has to tell the user: the warnings of `actors`, kept until the driver asks for them.

A warning may have more than its line, such as the stacks of an actor that hangs: `extra={WHOLE: text}`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

WHOLE = "whole"
"""The attribute of a log record that has more than its line, for the run's error log."""


class Announcement(NamedTuple):
    line: str
    whole: str = ""


class Announcements(logging.Handler):
    """Keeps the warnings of `actors` in this process, from its making on."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._said: list[Announcement] = []
        logging.getLogger("actors").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self._said.append(Announcement(record.getMessage(), getattr(record, WHOLE, "")))

    def since(self, heard: int) -> Sequence[Announcement]:
        """All but the first `heard`."""
        return self._said[heard:]
