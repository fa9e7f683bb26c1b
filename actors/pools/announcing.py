"""What a process has to tell the user: the warnings of `actors`, kept until the driver asks for them.

A warning may have more than its line, such as the stacks of an actor that hangs: `extra={WHOLE: text}`.
"""

from __future__ import annotations

import logging
import uuid
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
        self.process = uuid.uuid4().hex
        """Which process this is: another one that takes its place counts from zero."""
        self._said: list[Announcement] = []
        logging.getLogger("actors").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self._said.append(Announcement(record.getMessage(), getattr(record, WHOLE, "")))

    def since(self, process: str, heard: int) -> tuple[str, Sequence[Announcement]]:
        """This process, and what it has said but for the first `heard`, which were of `process`."""
        return self.process, self._said[heard if process == self.process else 0 :]
