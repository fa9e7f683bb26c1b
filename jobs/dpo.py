"""Stage `dpo`: the SFT policy learns preferences without rollouts. `... -- python -m jobs.dpo --config FILE`."""

from __future__ import annotations

from actors.pools.remote import put
from actors.training.dpo import DPOArguments, dpo_loop
from jobs.console import warn_of_stage
from jobs.reward_model import collected_or_published
from jobs.session import Session
from jobs.stage import main, stage
from rayrlhf.runs.metrics import read_metrics


@stage("dpo")
def dpo(session: Session) -> None:
    """Optimise the policy on the collected comparisons, or on what `data.comparisons` has."""
    session.warm_up(generators=False)
    arguments = DPOArguments(
        **session.loop_arguments("dpo"),
        policy=session.starts.of("dpo"),
        reference=session.starts.reference("dpo"),
        comparisons=put(collected_or_published(session, session.config.dpo.max_comparisons), session.local),
    )
    session.train("dpo", dpo_loop, arguments)
    session.run.download_files()
    measured = [
        line["dpo/heldout_accuracy"] for line in read_metrics(session.run.path, "dpo") if "dpo/heldout_accuracy" in line
    ]
    if measured and measured[-1] <= 0.5:
        warn_of_stage(
            session.run,
            "dpo",
            f"the policy's accuracy on held-out answers is {measured[-1]:.0%}, which is no better than chance; a "
            "higher dpo.optimizer.lr or more comparisons may help",
        )


if __name__ == "__main__":
    main(dpo)
