"""The exception for mistakes that a user can mend, and what any other error says, in one line."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class UserError(Exception):
    """Bad input or an impossible request.

    The message is one line: what is wrong, where (file, row or key), how to mend it.
    Entry points print it without a traceback and exit with status 2.
    """


class PlainError(RuntimeError):
    """Something that failed outside the program: an actor, a machine. Its message is one line for people."""


@contextlib.contextmanager
def naming(key: str) -> Iterator[None]:
    """A block whose `UserError` begins with the key of the config that it is about."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{key}: {error}") from None


def one_line(error: BaseException) -> str:
    """What an error says, without line breaks and terminal colours (which those of Ray have)."""
    return " ".join(without_colour(str(error)).split())


def without_colour(text: str) -> str:
    """A text without terminal colours, which those of Ray have."""
    return _COLOUR.sub("", text)
