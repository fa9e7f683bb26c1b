"""All stages one after the other: `rayrlhf run CONFIG`, or `... -- python -m jobs.pipeline --config FILE` as a job."""

from __future__ import annotations

from jobs.console import console
from jobs.session import Session
from jobs.stage import main, stage_function
from rayrlhf.reports.page import write_report
from rayrlhf.runs.stages import stages_of


def pipeline(session: Session) -> None:
    """Run the stages of the run in order; stages that are done are skipped."""
    config, run = session.config, session.run
    if run.done("evaluate"):
        if not run.report.exists():
            run.upload(write_report(run))
        found = f"{run.address_of(run.evaluation)}, {run.address_of(run.report)}"
        console.print(f"run {config.name!r} is finished: {found} (another one: name=OTHER)")
        return
    for stage in stages_of(config):
        stage_function(stage.name)(session)
    console.print(f"finished: {run.address}")


if __name__ == "__main__":
    main(pipeline)
