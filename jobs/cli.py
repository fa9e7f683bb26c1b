"""The `rayrlhf` command: one sub-command a stage, and `run` for all of them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from jobs.console import console
from jobs.pipeline import pipeline
from jobs.stage import StageFunction, guarded, run, stage_function
from jobs.status import scale_run, show_runs, show_status
from jobs.submit import MODULES, describe, submit
from jobs.sweep import sweep
from rayrlhf.config_file import load_config
from rayrlhf.errors import UserError
from rayrlhf.reports import compare as comparison
from rayrlhf.runs.stages import STAGES
from rayrlhf.sweeps.plan import load_sweep

app = typer.Typer(
    help="RLHF on Ray: supervised fine-tuning, a reward model from ranked answers, and PPO against it.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="The run's YAML file; examples are in configs/.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[key.sub=value ...]", help="Changes to the config, for example ppo.steps=5."),
]
Local = Annotated[bool, typer.Option("--local", help="Everything in this process, without Ray: for a debugger.")]


def _command(name: str, function: StageFunction, text: str) -> None:
    def command(config: ConfigFile, overrides: Overrides = None, local: Local = False) -> None:
        code = guarded(lambda: run(load_config(config, overrides), [function], local))
        sys.stdout.flush()
        raise typer.Exit(code)

    app.command(name, help=text, short_help=text.split(". ")[0])(command)


_command("run", pipeline, "All stages, one after the other. Finished stages are skipped; an interrupted run continues.")
for each in STAGES.values():
    _command(each.command, stage_function(each.name), each.summary)


@app.command("sweep")
def sweep_command(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="The sweep's YAML file; an example is in configs/sweeps/.")
    ],
    overrides: Overrides = None,
) -> None:
    """Try hyper-parameters on Ray Tune and rank them. Finished trials are skipped; the same command continues."""
    code = guarded(lambda: sweep(load_sweep(file, overrides or [])))
    sys.stdout.flush()
    raise typer.Exit(code)


@app.command("submit")
def submit_command(
    stage: Annotated[str, typer.Argument(metavar="STAGE", help=f"One of {', '.join(MODULES)}.")],
    config: ConfigFile,
    overrides: Overrides = None,
    address: Annotated[str, typer.Option(help="The cluster's dashboard.")] = "http://127.0.0.1:8265",
    working_dir: Annotated[Path, typer.Option(help="What the job gets, without what .rayignore names.")] = Path("."),
    env: Annotated[
        list[str] | None, typer.Option(help="KEY=VALUE for the job and its actors; may be repeated.")
    ] = None,
    python: Annotated[
        str, typer.Option(help="How Python is called there; `uv run` takes the project's lock.")
    ] = "python",
    follow: Annotated[bool, typer.Option(help="Print the job's log and exit as it does.")] = True,
) -> None:
    """Run a stage, or all (`run`), as a job on a Ray cluster. The same command continues a job that was stopped."""

    def action() -> None:
        variables = dict(_pair(each) for each in env or [])
        submit(describe(stage, config, overrides or [], working_dir, variables, python), address, follow)

    code = guarded(action)
    sys.stdout.flush()
    raise typer.Exit(code)


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise UserError(f"submit: --env {text!r} is not KEY=VALUE")
    return key, value


@app.command()
def compare(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN_FOLDER...", help="Finished runs, paths or URIs, for example one a seed."),
    ],
    output: Annotated[Path | None, typer.Option(help="Folder for compare.md and curves.png.")] = None,
) -> None:
    """Tables of one or more finished runs, with intervals; with --output curves, too. Needs no Ray."""

    def action() -> None:
        found = comparison.read_runs(runs)
        print(comparison.markdown(found))
        if output is not None:
            print("written:", *comparison.write(found, output))

    code = guarded(action)
    sys.stdout.flush()
    raise typer.Exit(code)


@app.command()
def status(
    run_folder: Annotated[str, typer.Argument(metavar="RUN_FOLDER", help="runs/quickstart or s3://bucket/runs/mine.")],
    address: Annotated[
        str | None,
        typer.Option(help="The run's cluster as host:port; without it RAY_ADDRESS, or where the run says it is."),
    ] = None,
) -> None:
    """Stage, step, time to go, actors, last warnings of a run, whether it is under way or not."""
    raise typer.Exit(guarded(lambda: show_status(run_folder, address, console)))


@app.command()
def scale(
    run_folder: Annotated[str, typer.Argument(metavar="RUN_FOLDER", help="Of a run that is under way.")],
    generators: Annotated[int | None, typer.Option(help="How many generators there are to be.")] = None,
    scorers: Annotated[int | None, typer.Option(help="How many scorers there are to be.")] = None,
    address: Annotated[
        str | None,
        typer.Option(help="The run's cluster as host:port; without it RAY_ADDRESS, or where the run says it is."),
    ] = None,
) -> None:
    """Grow or shrink the pools of a run while it trains. Newcomers join when they are up, leavers finish their work."""

    def action() -> None:
        wanted = scale_run(run_folder, address, generators, scorers)
        print("wanted from now on: " + ", ".join(f"{count} {role}s" for role, count in wanted.items()))

    raise typer.Exit(guarded(action))


@app.command()
def runs(
    directory: Annotated[
        str, typer.Argument(metavar="RUNS_DIR", help="Holds run folders: runs or s3://bucket/runs.")
    ] = "runs",
) -> None:
    """A table of the runs in a directory: how far each is, its last reward and KL, and whether it is running."""
    raise typer.Exit(guarded(lambda: show_runs(directory, console)))


def main() -> None:
    """Entry point of the `rayrlhf` command."""
    app()


if __name__ == "__main__":
    main()
