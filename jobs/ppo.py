"""Stage `ppo`: the SFT policy against the reward model. `ray job submit ... -- python -m jobs.ppo --config FILE`."""

from __future__ import annotations

from actors.training.ppo import PPOArguments, ppo_loop
from jobs.session import Session
from jobs.stage import main, stage
from jobs.stopping import asking_first
from rayrlhf.errors import UserError
from rayrlhf.models.loading import check_vocabulary


@stage("ppo")
def ppo(session: Session) -> None:
    """Optimise the policy; continues from the last checkpoint of the same settings."""
    session.warm_up(generators=True)
    config, run = session.config, session.run
    check_vocabulary(str(run.download(run.sft)), str(run.download(run.reward_model)))
    prompts = session.encode(session.train_splits.ppo)
    if not prompts:
        raise UserError("ppo: no prompts are left; lower data.sft_fraction or data.reward_model_fraction")
    session.wait_for_generators()
    session.start_scorers(run.reward_model, run.sft, measured=session.train_splits.ppo)
    sampling, timeout_s = session.sampling(config.ppo.temperature), config.resources.coordinator_timeout_s
    session.coordinator.call("set_prompts", prompts, sampling, timeout_s=timeout_s)
    arguments = PPOArguments(
        **session.loop_arguments("ppo"),
        policy=run.address_of(run.sft),
        value_model=run.address_of(run.reward_model),
        coordinator=session.coordinator,
    )
    with asking_first(lambda: session.coordinator.submit("request_stop")) as stopping:
        session.train("ppo", ppo_loop, arguments)
    if stopping.is_set() and not run.done("ppo"):
        raise KeyboardInterrupt


if __name__ == "__main__":
    main(ppo)
