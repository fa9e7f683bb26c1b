"""What went wrong outside the program, in one line: where it was, what it is, and what helps.

    rl step 13: learner rank 1 raised OSError: No space left on device: '/data/runs/...'; free space on that disk
    ^ place     ^ cause                                                                   ^ remedy

Errors of Ray, torch, safetensors and the operating system come from any process of a run. They are told by the names of
their classes and by their words, so that nothing has to be imported to understand them.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from rayrlhf.errors import PlainError, UserError, one_line

CAUSE_CHARACTERS = 240
"""An error's own words are cut after so many characters: the whole of it is in the run's error log."""
_PLACE, _LOG = "in ", "log: "
"""Notes of an exception that begin so say where in the run it came up, and which file has the whole of it."""


class _Known(NamedTuple):
    pattern: str
    """Of `TYPE: MESSAGE`."""
    remedy: str
    """Empty: none but the same command again."""
    lasting: bool
    """Whether a process that starts again would only meet it again."""


_KNOWN = tuple(
    _Known(*row)
    for row in (
        (r"No space left on device|OutOfDisk", "free space on that disk", True),
        (r"Disk quota exceeded", "free space within the quota, or have it raised", True),
        (r"Read-only file system|Permission denied|Operation not permitted", "give this user the right to it", True),
        (r"Too many open files", "raise the limit of open files, such as by `ulimit -n 65536`", True),
        (r"No module named", "install it on every node of the run", True),
        (
            r"SafetensorError|PytorchStreamReader|central directory|invalid header or archive|safetensors.*deserializ",
            "the file is cut short or damaged: copy it again, or delete what the run itself wrote",
            True,
        ),
        (r"\bcoordinator died", "", True),  # and so did those before it
        (
            r"(?i)out of memory|allocate memory|MemoryError|low on memory",
            "lower micro_batch_tokens of the stage, or give it a machine with more memory",
            False,
        ),
        (
            r"(?i)connection (closed|reset|refused)|Broken pipe|\bgloo\b",
            "most often another process of the run has ended: look for its line",
            False,
        ),
        (r"No such file or directory", "put it back, on every node of the run", False),
        (r"Input/output error|Stale file handle", "look after that disk or mount", False),
        (r"ObjectStoreFull", "give Ray's object store more memory", False),
    )
)
_OF_ANOTHER = re.compile(r"(?i)connection (closed|reset|refused)|Broken pipe")
"""What the others of a group say when one of them dies."""


def locate(error: BaseException, place: str) -> None:
    """Note where in the run an error came up, such as "rl step 13". The first place that is noted counts."""
    if place_of(error) is None:
        error.add_note(_PLACE + place)


def place_of(error: BaseException) -> str | None:
    """What `locate` has noted."""
    return _noted(error, _PLACE)


def note_log(error: BaseException, path: str) -> None:
    """Note which file has the whole of an error."""
    error.add_note(_LOG + path)


def log_of(error: BaseException) -> str | None:
    """What `note_log` has noted."""
    return _noted(error, _LOG)


def _noted(error: BaseException, kind: str) -> str | None:
    notes: list[str] = getattr(error, "__notes__", [])
    return next((note.removeprefix(kind) for note in notes if note.startswith(kind)), None)


def told(error: BaseException) -> str:
    """An error in one line: its place if one is noted, its cause, and its remedy if one is known."""
    place = place_of(error)
    return (f"{place}: " if place else "") + with_remedy(cause_of(error))


def cause_of(error: BaseException) -> str:
    """What an error says, in one line, with its type unless the words are for people already.

    >>> cause_of(OSError(28, "No space left on device", "/data/state.pt"))
    "OSError: No space left on device: '/data/state.pt'"
    """
    inner = getattr(error, "cause", None)
    if isinstance(inner, BaseException):  # Ray's wrap of what a task has raised, whose words are a traceback
        return cause_of(inner)
    words = one_line(error)
    if isinstance(error, PlainError | UserError | FloatingPointError):
        return words
    return cause(type(error).__name__, words)


def cause(kind: str, words: str) -> str:
    """The name of an error's class and its message as one line of bounded length."""
    words = re.sub(r"^\[Errno \d+\] ", "", " ".join(words.split()))
    if len(words) > CAUSE_CHARACTERS:
        words = words[:CAUSE_CHARACTERS].rstrip() + " ..."
    return f"{kind}: {words}" if words else kind


def with_remedy(cause: str) -> str:
    """A cause with what helps against it, unless it says that already or nothing is known."""
    known = _known(cause)
    return cause if known is None or known.remedy in cause else f"{cause}; {known.remedy}"


def lasting(cause: str) -> bool:
    """Whether a process that starts again would only meet this cause again, as a full disk."""
    known = _known(cause)
    return known is not None and known.lasting


def of_another(cause: str) -> bool:
    """Whether this is only how a process hears of the end of another one."""
    return _OF_ANOTHER.search(cause) is not None


def last_error(text: str) -> tuple[str, str]:
    """The class and the message of the exception at the end of a traceback's text.

    >>> last_error('Traceback (most recent call last):\\n  File "a.py", line 1, in f\\nx.BadThing: two\\nlines')
    ('BadThing', 'two lines')
    """
    lines = text.rstrip().splitlines()
    frames = [number for number, line in enumerate(lines) if line.startswith("  ")]
    end = " ".join(" ".join(lines[frames[-1] + 1 if frames and frames[-1] + 1 < len(lines) else -1 :]).split())
    found = re.match(r"(?:[A-Za-z_]\w*\.)*([A-Za-z_]\w*)(?:: (.*))?$", end)
    return (found[1], found[2] or "") if found else ("", end)


def _known(cause: str) -> _Known | None:
    return next((known for known in _KNOWN if re.search(known.pattern, cause)), None)
