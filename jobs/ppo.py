"""Stage `ppo`: the SFT policy against the reward model. `ray job submit ... -- python -m jobs.ppo --config FILE`."""

from __future__ import annotations

from actors.training.ppo import PPOArguments, ppo_loop
from jobs.session import Session
from jobs.stage import main, stage
from jobs.stopping import asking_first
from rayrlhf.data.sources import as_prompts
from rayrlhf.errors import UserError
from rayrlhf.models.loading import check_vocabulary


@stage("ppo")
def ppo(session: Session) -> None:
    """Optimise the policy; continues from the last checkpoint of the same settings."""
    session.warm_up(generators=True)
    config, run = session.config, session.run
    check_vocabulary(str(run.download(run.sft)), str(run.download(run.reward_model)))
    prompts = session.data.prompts(session.data.train.ppo)
    if not prompts:
        raise UserError("ppo: no prompts are left; lower data.sft_fraction or data.reward_model_fraction")
    session.rollouts.wait_for_generators()
    session.rollouts.start_scorers(run.reward_model, run.sft, measured=as_prompts(session.data.train.ppo))
    session.rollouts.call("set_prompts", prompts, session.rollouts.sampling(config.ppo.temperature))
    coordinator = session.rollouts.start()
    arguments = PPOArguments(
        **session.loop_arguments("ppo"),
        policy=run.address_of(run.sft),
        value_model=run.address_of(run.reward_model),
        coordinator=coordinator,
    )
    with asking_first(lambda: coordinator.submit("request_stop")) as stopping:
        session.train("ppo", ppo_loop, arguments)
    if stopping.is_set() and not run.done("ppo"):
        raise KeyboardInterrupt


if __name__ == "__main__":
    main(ppo)
