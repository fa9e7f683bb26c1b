"""Stage `ppo`: the SFT policy against the reward model. `ray job submit ... -- python -m jobs.ppo --config FILE`."""

from __future__ import annotations

from actors.training.fit import fit
from actors.training.ppo import LearnerArguments, ppo_loop
from jobs.follow import following
from jobs.session import Session
from jobs.stage import console, main, stage
from jobs.stopping import asking_first
from rayrlhf.errors import UserError
from rayrlhf.models.loading import check_vocabulary


@stage("ppo")
def ppo(session: Session) -> None:
    """Optimise the policy; continues from the last checkpoint of the same settings."""
    config, run = session.config, session.run
    check_vocabulary(str(run.download(run.sft)), str(run.download(run.reward_model)))
    prompts = session.encode(session.train_splits.ppo)
    if not prompts:
        raise UserError("ppo: no prompts are left; lower data.sft_fraction or data.reward_model_fraction")
    session.wait_for_generators()
    session.start_scorers(run.reward_model, run.sft, measured=session.train_splits.ppo)
    sampling, timeout_s = session.sampling(config.ppo.temperature), config.resources.coordinator_timeout_s
    session.coordinator.call("set_prompts", prompts, sampling, timeout_s=timeout_s)
    arguments = LearnerArguments(
        config, run.address, run.address_of(run.sft), run.address_of(run.reward_model), session.coordinator
    )
    with (
        following(run, config, "ppo", config.ppo.steps, console),
        asking_first(lambda: session.coordinator.submit("request_stop")) as stopping,
    ):
        fit(
            ppo_loop,
            {"learner": arguments},
            name=session.checkpoint_name("ppo"),
            storage=run.address_of(run.checkpoints),
            learner=config.resources.learner,
            keep_checkpoints=config.ppo.keep_checkpoints,
            local=session.local,
        )
    if stopping.is_set() and not run.done("ppo"):
        raise KeyboardInterrupt


if __name__ == "__main__":
    main(ppo)
