"""What is printed: as it is, but for characters that a terminal would obey.

A text from a data file, a model, a labeller, a server or a file name may hold escape sequences. A terminal that gets
them changes its title, answers as if its user had typed, hides lines or writes over them; and characters that turn the
direction of a text show it in another order than it has (https://trojansource.codes).
"""

from __future__ import annotations

import logging
import re
import sys

# Controls of C0 and C1 other than tab and line feed, DEL, embeddings, overrides and isolates of direction, and halves
# of surrogate pairs, which no encoding has: Python puts them for bytes of a file name that are not UTF-8.
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
SHOWN = "\ufffd"
"""What stands in place of each of them."""


def printable(text: str) -> str:
    """The text with a visible sign in place of every character that a terminal would obey; lines end with a feed."""
    return _OBEYED.sub(SHOWN, text.replace("\r\n", "\n"))


def say(text: str, end: str = "\n") -> None:
    """Print a text on standard output at once."""
    print(printable(text), end=end, flush=True)


class LogFormatter(logging.Formatter):
    """Log records, which may quote servers and files, as `printable` shows them."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def complain(text: str) -> None:
    """Print a text on standard error at once."""
    print(printable(text), file=sys.stderr, flush=True)
