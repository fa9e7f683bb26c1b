"""What every stage has around it: it is skipped if it is done, and refuses to start before the stages that it needs."""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
import time
from collections.abc import Callable, Iterator, Sequence

from rich.text import Text

from jobs.console import console, warn_of_stage
from jobs.guard import guarded
from jobs.session import Session, opened
from jobs.stopping import interrupted_by_sigterm
from rayrlhf.config import Config
from rayrlhf.config_file import load_config
from rayrlhf.errors import UserError
from rayrlhf.failures import locate
from rayrlhf.reports.progress import duration
from rayrlhf.runs.metrics import MetricsWriter
from rayrlhf.runs.samples import forget_samples
from rayrlhf.runs.stages import STAGES, stages_of

StageFunction = Callable[[Session], None]
Runner = Callable[[Config, bool], None]
"""Takes a config, and whether all is to happen in this process."""


def stage(
    name: str, again: Callable[[Session], bool] = lambda session: False
) -> Callable[[StageFunction], StageFunction]:
    """Make a stage of a function: it runs only if its output is missing and the outputs that it needs are there.

    Args:
        name: a key of `STAGES`, which also says what the stage needs.
        again: whether a session asks for more than the run's own output, so that the stage runs though it is done.
    """

    def decorate(function: StageFunction) -> StageFunction:
        @functools.wraps(function)
        def run_stage(session: Session) -> None:
            run = session.run
            if session.interrupted:
                raise KeyboardInterrupt
            if run.done(name) and not again(session):
                console.print(f"{name}: already done, see {run.address_of(run.output(name))}")
                return
            _check_part(name, session)
            _check_needs(name, session)
            if session.start():
                for remark in session.remarks:
                    warn_of_stage(run, name, remark)
                console.print(session.overview())
                if session.placement:
                    console.print(session.placement)
            console.rule(Text(name, style="bold"), align="left")
            started = time.monotonic()
            # `guarded` has set this handler already, but Ray replaced it with its own when it started.
            with interrupted_by_sigterm(), _located(name):
                function(session)
            forget_samples(run)
            seconds = time.monotonic() - started
            with MetricsWriter(run.address) as metrics:
                metrics.write("run", list(STAGES).index(name), {f"time/{name}": seconds})
            console.print(f"{name}: done in {duration(seconds)}, see {run.address_of(run.output(name))}")

        return run_stage

    return decorate


@contextlib.contextmanager
def _located(name: str) -> Iterator[None]:
    """In the block, errors that do not say where they came up say that it was in this stage."""
    try:
        yield
    except Exception as error:
        locate(error, name)
        raise


def _check_part(name: str, session: Session) -> None:
    """
    Raises:
        UserError: the run does without the stage.
    """
    own = [each.name for each in stages_of(session.config)]
    if name not in own:
        raise UserError(
            f"stage {name!r} is no part of this run, whose stages are: {', '.join(own)}; see the key stages"
        )


def _check_needs(name: str, session: Session) -> None:
    """
    Raises:
        UserError: a stage that `name` needs is not done, or a file that it has written is damaged.
    """
    run = session.run
    for earlier in STAGES[name].inputs(session.config):
        if not run.done(earlier.name):
            needed = run.address_of(run.output(earlier.name))
            instead = f", or set {earlier.left_out_with}" if earlier.left_out_with else ""
            raise UserError(
                f"stage {name!r} needs {needed}, which stage {earlier.name!r} writes; run that first{instead}"
            )
        run.require_whole(earlier.name)


def run(
    config: Config, stages: Sequence[StageFunction], local: bool, connection: contextlib.ExitStack | None = None
) -> None:
    """Run stages one after the other with one Ray connection, which `connection` closes if it is given."""
    with opened(config, local, connection) as session:
        for each in stages:
            each(session)


def main(function: StageFunction, run_all: Runner | None = None) -> None:
    """The command line of `python -m jobs.STAGE`.

    Args:
        function: the stage.
        run_all: what to do with the config and `--local`, where it is more than to run the stage.
    """

    def run_one(config: Config, local: bool) -> None:
        run(config, [function], local)

    parser = argparse.ArgumentParser(description=function.__doc__)
    parser.add_argument("--config", required=True, help="the run's YAML file")
    parser.add_argument("--local", action="store_true", help="everything in this process, without Ray (for a debugger)")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="changes to the config")
    arguments = parser.parse_args()
    runner = run_all or run_one
    sys.exit(guarded(lambda: runner(load_config(arguments.config, arguments.overrides), arguments.local)))
