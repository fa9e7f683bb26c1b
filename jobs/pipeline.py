"""All stages one after the other: `rayrlhf run CONFIG`, or `... -- python -m jobs.pipeline --config FILE` as a job."""

from __future__ import annotations

from jobs.collect import collect
from jobs.evaluate import evaluate
from jobs.ppo import ppo
from jobs.reward_model import reward_model
from jobs.session import Session
from jobs.sft import sft
from jobs.stage import console, main
from rayrlhf.reports.page import write_report


def pipeline(session: Session) -> None:
    """SFT, comparisons, reward model, PPO and evaluation; stages that are done are skipped."""
    config, run = session.config, session.run
    if run.done("evaluate"):
        if not run.report.exists():
            run.upload(write_report(run))
        found = f"{run.address_of(run.evaluation)}, {run.address_of(run.report)}"
        console.print(f"run {config.name!r} is finished: {found} (another one: name=OTHER)")
        return
    sft(session)
    if config.data.comparisons is None:
        collect(session)
    reward_model(session)
    ppo(session)
    evaluate(session)
    console.print(f"finished: {run.address}")


if __name__ == "__main__":
    main(pipeline)
