"""The one exception for mistakes that a user can mend, and what any other error says, in one line."""

from __future__ import annotations

import re

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class UserError(Exception):
    """Bad input or an impossible request.

    The message is one line: what is wrong, where (file, row or key), how to mend it.
    Entry points print it without a traceback and exit with status 2.
    """


def one_line(error: BaseException) -> str:
    """What an error says, without line breaks and terminal colours (which those of Ray have)."""
    return " ".join(_COLOUR.sub("", str(error)).split())
