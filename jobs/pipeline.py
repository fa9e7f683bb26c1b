"""All stages one after the other: `rayrlhf run CONFIG`, or `... -- python -m jobs.pipeline --config FILE` as a job."""

from __future__ import annotations

import contextlib

from jobs.collect import collect
from jobs.console import console
from jobs.dpo import dpo
from jobs.evaluate import evaluate
from jobs.reward_model import reward_model
from jobs.rl import rl
from jobs.rounds import run_rounds
from jobs.session import Session
from jobs.sft import sft
from jobs.stage import StageFunction, main, run
from rayrlhf.config import Config
from rayrlhf.reports.page import write_report
from rayrlhf.runs.stages import stages_of

STAGE_FUNCTIONS: dict[str, StageFunction] = {
    "sft": sft, "collect": collect, "reward_model": reward_model, "dpo": dpo, "rl": rl, "evaluate": evaluate,
}  # fmt: skip
"""What runs each stage of `rayrlhf.runs.stages.STAGES`."""


def pipeline(session: Session) -> None:
    """Run the stages of the run in order; stages that are done are skipped."""
    config, run = session.config, session.run
    last = stages_of(config)[-1].name
    if last == "evaluate" and run.done(last):
        if not run.report.exists():
            run.upload(write_report(run))
        found = f"{run.address_of(run.evaluation)}, {run.address_of(run.report)}"
        console.print(f"run {config.name!r} is finished: {found} (another one: name=OTHER)")
        return
    for stage in stages_of(config):
        STAGE_FUNCTIONS[stage.name](session)
    console.print(f"finished: {run.address}")


def run_all(config: Config, local: bool) -> None:
    """Run the stages of a config, once or in rounds, with one Ray connection."""
    with contextlib.ExitStack() as connection:

        def run_once(own: Config) -> None:
            run(own, [pipeline], local, connection)

        if config.rounds is None:
            run_once(config)
        else:
            run_rounds(config, run_once)


if __name__ == "__main__":
    main(pipeline, run_all)
