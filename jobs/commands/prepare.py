"""Commands around a run's start: its config, its data, a sweep of runs, a job on a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jobs.commands.options import ConfigFile, Overrides, run_guarded
from rayrlhf.errors import UserError
from rayrlhf.runs.stages import STAGES
from rayrlhf.terminal import say

app = typer.Typer()


@app.command("config")
def config_command(config: ConfigFile, overrides: Overrides = None) -> None:
    """Print the whole config with its defaults, and behind each value where it comes from. The output is a config."""

    def action() -> None:
        from rayrlhf.config_origins import annotated

        say(annotated(config, overrides or []), end="")

    run_guarded(action)


@app.command("init")
def init_command(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder, or one without a config.yaml.")],
) -> None:
    """Write a commented config for a run on your own data, and a README with the next commands."""

    def action() -> None:
        from rayrlhf.starter import write_starter

        say(" ".join(["written:", *map(str, write_starter(directory))]))
        say(f"next: put your rows into {directory / 'demonstrations.jsonl'}, as {directory / 'README.md'} says")

    run_guarded(action)


@app.command("data")
def data_command(
    source: Annotated[
        str, typer.Argument(metavar="CONFIG|FILE", help="A run's YAML file, or a file, directory or hub name of data.")
    ],
    overrides: Overrides = None,
    model: Annotated[
        str | None, typer.Option(help="Count tokens with this model's tokenizer. A file alone has the embedded one.")
    ] = None,
) -> None:
    """Show what a run would use of its data: records by use, lengths, what is dropped, cut or unused, an example."""

    def action() -> None:
        from jobs.console import console
        from jobs.data import show_data

        show_data(source, overrides or [], model, console)

    run_guarded(action)


@app.command("sweep")
def sweep_command(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="The sweep's YAML file; an example is in configs/sweeps/.")
    ],
    overrides: Overrides = None,
) -> None:
    """Try hyper-parameters on Ray Tune and rank them. Finished trials are skipped; the same command continues."""

    def action() -> None:
        from rayrlhf.sweeps.plan import load_sweep

        plan = load_sweep(file, overrides or [])
        from jobs.sweep import sweep

        sweep(plan)

    run_guarded(action)


@app.command("submit")
def submit_command(
    stage: Annotated[
        str,
        typer.Argument(
            metavar="STAGE", help=f"One of run, {', '.join(stage.command for stage in STAGES.values())}, sweep."
        ),
    ],
    config: ConfigFile,
    overrides: Overrides = None,
    address: Annotated[str, typer.Option(help="The cluster's dashboard.")] = "http://127.0.0.1:8265",
    working_dir: Annotated[
        Path, typer.Option(help="The directory that is uploaded, without the files that its .rayignore names.")
    ] = Path("."),
    env: Annotated[
        list[str] | None, typer.Option(help="KEY=VALUE for the job and its actors; may be repeated.")
    ] = None,
    python: Annotated[
        str, typer.Option(help="How Python is called on the cluster; `uv run` takes the project's lock file.")
    ] = "python",
    follow: Annotated[bool, typer.Option(help="Print the job's log and exit as the job does.")] = True,
) -> None:
    """Run a stage, or all (`run`), as a job on a Ray cluster. The same command continues a job that was stopped."""

    def action() -> None:
        from jobs.job import describe

        job = describe(stage, config, overrides or [], working_dir, dict(_pair(each) for each in env or []), python)
        from jobs.submit import submit

        submit(job, address, follow)

    run_guarded(action)


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise UserError(f"submit: --env {text!r} is not KEY=VALUE")
    return key, value
