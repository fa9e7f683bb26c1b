"""What every stage has around it: skipping what is done, refusing to start too early, errors in one line, exit codes.

Exit codes: 0 success, 1 failure, 2 a mistake that the user can mend, 130 interrupted (Ctrl-C or SIGTERM).
"""

from __future__ import annotations

import argparse
import functools
import importlib
import logging
import sys
import time
from collections.abc import Callable, Sequence

from ray.exceptions import RayError
from ray.train import TrainingFailedError

from actors.pools.remote import ActorFailure
from jobs.console import console
from jobs.session import Session, opened
from jobs.stopping import interrupted_by_sigterm
from rayrlhf.config import Config
from rayrlhf.config_file import load_config
from rayrlhf.errors import UserError
from rayrlhf.reports.progress import duration
from rayrlhf.runs.metrics import MetricsWriter
from rayrlhf.runs.stages import STAGES

StageFunction = Callable[[Session], None]


def stage(
    name: str, again: Callable[[Session], bool] = lambda session: False
) -> Callable[[StageFunction], StageFunction]:
    """Make a stage of a function: it runs only if its output is missing and the outputs that it needs are there.

    Args:
        name: a key of `STAGES`, which also says what the stage needs.
        again: says of a session that it asks for something else than the run's own output, so that "done" does not
            count.
    """

    def decorate(function: StageFunction) -> StageFunction:
        @functools.wraps(function)
        def run_stage(session: Session) -> None:
            run = session.run
            if run.done(name) and not again(session):
                console.print(f"{name}: already done, see {run.address_of(run.output(name))}")
                return
            for earlier in (STAGES[needed] for needed in STAGES[name].needs):
                if earlier.part_of(session.config) and not run.done(earlier.name):
                    needed = run.address_of(run.output(earlier.name))
                    instead = f", or set {earlier.left_out_with}" if earlier.left_out_with else ""
                    raise UserError(
                        f"stage {name!r} needs {needed}, which stage {earlier.name!r} writes; run that first{instead}"
                    )
            if session.start():
                console.print(session.overview())
                if session.placement:
                    console.print(session.placement)
            console.rule(f"[bold]{name}", align="left")
            started = time.monotonic()
            with interrupted_by_sigterm():  # again: Ray has set a handler of its own when it started
                function(session)
            seconds = time.monotonic() - started
            with MetricsWriter(run.address) as metrics:
                metrics.write("run", list(STAGES).index(name), {f"time/{name}": seconds})
            console.print(f"{name}: done in {duration(seconds)}, see {run.address_of(run.output(name))}")

        return run_stage

    return decorate


def stage_function(name: str) -> StageFunction:
    """The function that runs the stage of that name: it is called so, too, in a module of that name."""
    function: StageFunction = getattr(importlib.import_module(f"jobs.{name}"), name)
    return function


def run(config: Config, stages: Sequence[StageFunction], local: bool) -> None:
    """Run stages one after the other with one Ray connection."""
    with opened(config, local) as session:
        for each in stages:
            each(session)


def guarded(action: Callable[[], None]) -> int:
    """Run `action`; turn what can go wrong into one line on standard error and an exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        with interrupted_by_sigterm():
            action()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except ActorFailure as error:
        print(f"failed: {error}", file=sys.stderr, flush=True)
        return 1
    except TrainingFailedError as error:
        print(
            f"failed: Ray Train gave up; finished stages and checkpoints are kept\n{error}", file=sys.stderr, flush=True
        )
        return 1
    except FloatingPointError as error:
        print(f"failed: {error}", file=sys.stderr, flush=True)
        return 1
    except (OSError, RayError) as error:
        print(f"failed: {type(error).__name__}: {' '.join(str(error).split())[-600:]}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        print(
            "interrupted: finished stages and checkpoints are kept; the same command continues",
            file=sys.stderr,
            flush=True,
        )
        return 130
    return 0


def main(function: StageFunction) -> None:
    """The command line of `python -m jobs.STAGE`."""
    parser = argparse.ArgumentParser(description=function.__doc__)
    parser.add_argument("--config", required=True, help="the run's YAML file")
    parser.add_argument("--local", action="store_true", help="everything in this process, without Ray (for a debugger)")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="changes to the config")
    arguments = parser.parse_args()
    code = guarded(lambda: run(load_config(arguments.config, arguments.overrides), [function], arguments.local))
    sys.stdout.flush()
    sys.exit(code)
