"""Commands that look at runs, finished or under way."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jobs.commands.options import Address, Folder, run_guarded
from rayrlhf.terminal import say

app = typer.Typer()


@app.command()
def compare(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN_FOLDER...", help="Finished runs, paths or URIs, for example one for each seed."),
    ],
    output: Annotated[Path | None, typer.Option(help="Folder for compare.md and curves.png.")] = None,
) -> None:
    """Print tables of one or more finished runs, with intervals; with --output also draw curves. Needs no Ray."""

    def action() -> None:
        from rayrlhf.reports import compare as comparison

        found = comparison.read_runs(runs)
        say(comparison.markdown(found))
        if output is not None:
            say(" ".join(["written:", *map(str, comparison.write(found, output))]))

    run_guarded(action)


@app.command("report")
def report_command(
    run_folder: Folder,
    watch: Annotated[
        bool, typer.Option("--watch", help="Serve the page on this machine and follow the run, until Ctrl-C.")
    ] = False,
    port: Annotated[int, typer.Option(help="Of --watch; 0 takes any that is free.")] = 8200,
) -> None:
    """Write a run's report.html anew, finished or not; with --watch, serve it live. Needs no Ray."""

    def action() -> None:
        from jobs import report

        if watch:
            report.watch(run_folder, port)
        else:
            report.write(run_folder)

    run_guarded(action)


@app.command("agreement")
def agreement_command(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN_FOLDER...", help="Runs with the same answers, paths or URIs; often one alone."),
    ],
) -> None:
    """Print how far people, judge, reward model and gold measure agree on pairs of answers. Needs no Ray."""

    def action() -> None:
        from jobs.console import console
        from rayrlhf.reports.agreement import labellers_grid, raters_grid
        from rayrlhf.reports.raters import agreement_of, people_of
        from rayrlhf.runs.folder import run_at

        console.print(raters_grid(agreement_of(runs)).rich())
        for people in map(people_of, map(run_at, runs)):
            if people:
                console.print(labellers_grid(*people).rich())

    run_guarded(action)


@app.command()
def rounds(run_folder: Folder) -> None:
    """Show the rounds of a run side by side: gold, reward, KL, win rates, and accuracy of the reward models."""

    def action() -> None:
        from jobs.console import console
        from jobs.status import show_rounds

        show_rounds(run_folder, console)

    run_guarded(action)


@app.command()
def status(run_folder: Folder, address: Address = None) -> None:
    """Show a run, under way or not: its stage, step, time to go, actors and last warnings."""

    def action() -> None:
        from jobs.console import console
        from jobs.status import show_status

        show_status(run_folder, address, console)

    run_guarded(action)


@app.command("doctor")
def doctor_command(
    run_folder: Folder,
    output: Annotated[Path | None, typer.Option(help="The archive; default: doctor-NAME.tar.gz here.")] = None,
) -> None:
    """Print why a run most likely ended, and pack logs, config, metrics and facts without secrets, to send them on."""

    def action() -> None:
        from jobs.doctor import doctor

        archive, cause = doctor(run_folder, output)
        say(f"most likely: {cause}")
        say(f"packed: {archive} (look through it before you send it)")

    run_guarded(action)


@app.command()
def scale(
    run_folder: Folder,
    generators: Annotated[int | None, typer.Option(help="The number of generators wanted.")] = None,
    scorers: Annotated[int | None, typer.Option(help="The number of scorers wanted.")] = None,
    address: Address = None,
) -> None:
    """Grow or shrink the pools of a run while it trains. New actors join when they are ready; removed ones finish."""

    def action() -> None:
        from jobs.status import scale_run

        wanted = scale_run(run_folder, address, generators, scorers)
        say("wanted from now on: " + ", ".join(f"{count} {role}s" for role, count in wanted.items()))

    run_guarded(action)


@app.command()
def runs(
    directory: Annotated[
        str, typer.Argument(metavar="RUNS_DIR", help="Holds run folders: runs or s3://bucket/runs.")
    ] = "runs",
) -> None:
    """Print a table of the runs in a directory: how far each is, its last reward and KL, and whether it is running."""

    def action() -> None:
        from jobs.console import console
        from jobs.status import show_runs

        show_runs(directory, console)

    run_guarded(action)
