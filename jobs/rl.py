"""Stage `rl`: the SFT policy against the rewards. `ray job submit ... -- python -m jobs.rl --config FILE`."""

from __future__ import annotations

from actors.pools.remote import put
from actors.training.dev_answers import DevPrompt
from actors.training.rl import RLArguments, rl_loop
from jobs.session import Session
from jobs.stage import main, stage
from jobs.stopping import asking_first
from rayrlhf.data.sources import as_prompts
from rayrlhf.errors import UserError
from rayrlhf.models.loading import check_vocabulary


@stage("rl")
def rl(session: Session) -> None:
    """Optimise the policy; continues from the last checkpoint of the same settings."""
    session.warm_up(generators=True)
    config, run = session.config, session.run
    start = run.start_of_rl(config)
    if config.trains_reward_model:
        check_vocabulary(str(run.download(start)), str(run.download(run.reward_model)))
    prompts = session.data.prompts(session.data.train.rl)
    if not prompts:
        raise UserError("rl: no prompts are left; lower data.sft_fraction or data.reward_model_fraction")
    dev = dev_prompts(session)
    session.rollouts.wait_for_generators()
    session.rollouts.start_scorers([*as_prompts(session.data.train.rl), *(p.prompt for p in dev)], start, gold=True)
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
        dev=put(dev, session.local),
    )
    with asking_first(lambda: coordinator.submit("request_stop")) as stopping:
        session.train("rl", rl_loop, arguments)
    if stopping.is_set() and not run.done("rl"):
        raise KeyboardInterrupt


def dev_prompts(session: Session) -> list[DevPrompt]:
    """The dev prompts that the policy answers while it trains, the first ones.

    Raises:
        UserError: it is to be evaluated on some, and there are none.
    """
    settings = session.config.rl
    sampled = settings.sample_prompts if settings.sample_every else 0
    evaluated = settings.eval_prompts if settings.eval_every else 0
    records = session.data.dev[: max(sampled, evaluated)]
    if settings.eval_every and not records:
        raise UserError("rl.eval_every: there are no dev prompts; raise data.dev_fraction")
    return [
        DevPrompt(encoded, prompt)
        for encoded, prompt in zip(session.data.prompts(records), as_prompts(records), strict=True)
    ]


if __name__ == "__main__":
    main(rl)
