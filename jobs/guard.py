"""What every command has around it: an error becomes one line on standard error, and an exit code.

Exit codes: 0 success, 1 failure, 2 a mistake that the user can mend, 130 interrupted (Ctrl-C or SIGTERM).

This module imports nothing that is slow to import, so that `rayrlhf --help` and mistakes in a config answer at once.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable

from jobs.stopping import interrupted_by_sigterm
from rayrlhf.errors import PlainError, UserError
from rayrlhf.failures import log_of, told
from rayrlhf.scratch import scratch
from rayrlhf.terminal import LogFormatter, complain
from rayrlhf.wording import in_a_line


def guarded(action: Callable[[], None]) -> int:
    """Run `action`; return the exit code, after an error with one line on standard error.

    An error of the program itself, such as a KeyError, passes through with its traceback, unless it is in the log of
    a run: then it is one line, too, which names the log.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(LogFormatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    try:
        with interrupted_by_sigterm(), scratch():
            action()
    except UserError as error:
        _say(in_a_line(f"error: {error}"))
        return 2
    except KeyboardInterrupt:
        _say("interrupted: finished stages and checkpoints are kept; the same command continues")
        return 130
    except Exception as error:
        failure = _failure(error)
        if failure is None:
            raise
        _say(f"failed: {failure}")
        return 1
    finally:
        sys.stdout.flush()
    return 0


def _failure(error: Exception) -> str | None:
    """What to say of something that went wrong; None of the program's own errors, unless a log has the whole of it."""
    log = log_of(error)
    if log is not None:
        # What was not finite comes again.
        again = "" if isinstance(error, FloatingPointError) else "; the same command continues"
        return f"{told(error)}{again}; log: {log}"
    return told(error) if isinstance(error, _outside_the_program()) else None


def _outside_the_program() -> tuple[type[Exception], ...]:
    own = (PlainError, FloatingPointError, OSError)
    if "ray" not in sys.modules:  # only a command that has imported Ray, which takes seconds, can see its errors
        return own
    from ray.exceptions import RayError

    return (*own, RayError)


def _say(line: str) -> None:
    complain(line)
