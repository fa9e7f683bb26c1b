"""Arguments and options that several commands have, and how a command runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from jobs.guard import guarded

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="The run's YAML file; examples are in configs/.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="key.sub=value", help="Changes to the config, for example rl.steps=5."),
]
Local = Annotated[bool, typer.Option("--local", help="Run everything in this process, without Ray: for a debugger.")]
Folder = Annotated[str, typer.Argument(metavar="RUN_FOLDER", help="runs/quickstart, or s3://bucket/runs/mine.")]
Address = Annotated[
    str | None,
    typer.Option(help="The run's cluster as host:port. Without it: RAY_ADDRESS, or where the run says it is."),
]


def run_guarded(action: Callable[[], None]) -> None:
    """Run a command's action and end with its exit code."""
    raise typer.Exit(guarded(action))
