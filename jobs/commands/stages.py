"""`rayrlhf run`, and a sub-command for each stage."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.commands.options import ConfigFile, Local, Overrides, run_guarded
from rayrlhf.errors import UserError
from rayrlhf.runs.stages import STAGES

if TYPE_CHECKING:
    from jobs.stage import Runner

app = typer.Typer()


def _add_stage(command: str, text: str, load: Callable[[], Runner]) -> None:
    """Add the sub-command that does with its config what the function does that `load` imports."""

    def run_command(config: ConfigFile, overrides: Overrides = None, local: Local = False) -> None:
        def action() -> None:
            from rayrlhf.config_file import load_config

            loaded = load_config(config, overrides)
            load()(loaded, local)

        run_guarded(action)

    app.command(command, help=text, short_help=text.split(". ")[0])(run_command)


@app.command("ppo", hidden=True, context_settings={"ignore_unknown_options": True})
def _old_name(words: Annotated[list[str] | None, typer.Argument()] = None) -> None:
    """The stage's name in earlier versions."""

    def action() -> None:
        raise UserError("the stage ppo is rl now: rayrlhf rl CONFIG, whose section rl has algorithm: ppo by default")

    run_guarded(action)


def _pipeline() -> Runner:
    from jobs.pipeline import run_all

    return run_all


def _stage(name: str) -> Runner:
    from jobs.pipeline import STAGE_FUNCTIONS
    from jobs.stage import run

    return lambda config, local: run(config, [STAGE_FUNCTIONS[name]], local)


_add_stage(
    "run", "Run all stages, one after the other. Finished stages are skipped; an interrupted run continues.", _pipeline
)
for each in STAGES.values():
    _add_stage(each.command, each.summary, lambda name=each.name: _stage(name))  # type: ignore[misc]
