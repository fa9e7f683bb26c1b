"""What every command has around it: an error becomes one line on standard error, and an exit code.

Exit codes: 0 success, 1 failure, 2 a mistake that the user can mend, 130 interrupted (Ctrl-C or SIGTERM).

This module imports nothing that is slow to import, so that `rayrlhf --help` and mistakes in a config answer at once.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable

from jobs.stopping import interrupted_by_sigterm
from rayrlhf.errors import UserError
from rayrlhf.scratch import scratch
from rayrlhf.terminal import LogFormatter, complain


def guarded(action: Callable[[], None]) -> int:
    """Run `action`; return the exit code, after an error with one line on standard error.

    An error of the program itself, such as a KeyError, passes through with its traceback.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(LogFormatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    try:
        with interrupted_by_sigterm(), scratch():
            action()
    except UserError as error:
        _say(f"error: {error}")
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
    """What to say of something that went wrong outside the program; None of any other error."""
    if "ray" in sys.modules and (said := _failure_in_ray(error)):
        return said
    if isinstance(error, FloatingPointError):
        return str(error)
    return _named(error) if isinstance(error, OSError) else None


def _failure_in_ray(error: Exception) -> str | None:
    # Imported here: only a command that has imported Ray can see its errors, and Ray takes seconds to import.
    from ray.exceptions import RayError
    from ray.train import TrainingFailedError

    from actors.pools.remote import ActorFailure

    if isinstance(error, ActorFailure):
        return str(error)
    if isinstance(error, TrainingFailedError):
        return f"Ray Train gave up; finished stages and checkpoints are kept\n{error}"
    return _named(error) if isinstance(error, RayError) else None


def _named(error: Exception) -> str:
    """The error's type and the end of its message, in one line: the end of Ray's messages has the cause."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[-600:]}"


def _say(line: str) -> None:
    complain(line)
