"""Stage `rl`: the SFT policy against the rewards. `ray job submit ... -- python -m jobs.rl --config FILE`."""

from __future__ import annotations

from actors.training.rl import RLArguments, rl_loop
from jobs.session import Session
from jobs.stage import main, stage
from jobs.stopping import asking_first
from rayrlhf.models.loading import check_vocabulary


@stage("rl")
def rl(session: Session) -> None:
    """Optimise the policy; continues from the last checkpoint of the same settings."""
    session.warm_up(generators=True)
    config, run = session.config, session.run
    start = run.start_of_rl(config)
    if config.trains_reward_model:
        check_vocabulary(str(run.download(start)), str(run.download(run.reward_model)))
    prompts = session.data.prompts(session.data.rl)
    session.rollouts.wait_for_generators()
    session.rollouts.start_scorers(session.data.rl, start, gold=True)
    session.rollouts.call("set_prompts", prompts, session.rollouts.sampling(config.rl.draw, play=True))
    coordinator = session.rollouts.start()
    arguments = RLArguments(
        **session.loop_arguments("rl"),
        policy=run.address_of(start),
        value_model=run.address_of(run.reward_model if config.trains_reward_model else start)
        if config.rl.critic
        else None,
        coordinator=coordinator,
        plugin=session.plugin,
    )
    with asking_first(lambda: coordinator.submit("request_stop")) as stopping:
        session.train("rl", rl_loop, arguments)
    if stopping.is_set() and not run.done("rl"):
        raise KeyboardInterrupt


if __name__ == "__main__":
    main(rl)
