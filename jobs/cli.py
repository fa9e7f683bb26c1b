"""The `rayrlhf` command: one sub-command a stage, `run` for all of them, and commands around runs and their models.

Help, completion and a mistake in a config have to answer at once. So this module and `jobs.commands` import only what
is quick to import; a command imports torch, Ray and the rest when it runs, after it has read its config.
"""

from __future__ import annotations

from typing import Annotated

import typer

from jobs.commands import looks, models, people, prepare, stages
from rayrlhf.runs.versions import versions
from rayrlhf.terminal import say

app = typer.Typer(
    help="RLHF on Ray: supervised fine-tuning, a reward model from ranked answers, and reinforcement learning.",
    no_args_is_help=True,
    rich_markup_mode=None,  # plain help: to draw boxes round it took a third of its time
    pretty_exceptions_enable=False,
)


def _print_versions(wanted: bool) -> None:
    if not wanted:
        return
    say("\n".join(f"{name} {version}" for name, version in versions().items()))
    raise typer.Exit()


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_versions, is_eager=True, help="Print the versions, and exit."),
    ] = False,
) -> None:
    """What is common to all commands."""


for group in (stages, prepare, people, looks, models):
    app.add_typer(group.app)


def main() -> None:
    """Entry point of the `rayrlhf` command."""
    app()


if __name__ == "__main__":
    main()
