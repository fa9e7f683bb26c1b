"""Stage `rl`: the SFT policy against the rewards. `ray job submit ... -- python -m jobs.rl --config FILE`."""

from __future__ import annotations

from actors.pools.remote import put
from actors.training.dev_answers import DevPrompt
from actors.training.rl import RLArguments, rl_loop
from jobs.console import console
from jobs.session import Session
from jobs.stage import main, stage
from rayrlhf.errors import UserError
from rayrlhf.models.loading import check_vocabulary
from rayrlhf.runs.storage import local_copy


@stage("rl")
def rl(session: Session) -> None:
    """Optimise the policy; continues from the last checkpoint of the same settings."""
    session.warm_up(generators=True)
    config = session.config
    start = session.starts.of("rl")
    if session.starts.reward_model is not None:
        check_vocabulary(local_copy(start), local_copy(session.starts.reward_model))
    prompts = session.data.prompts(session.data.rl)
    if config.rl.skip_prompts:
        wanted = config.rl.steps * config.rl.prompts_per_step
        fresh = min(max(len(prompts) - config.rl.skip_prompts, 0), wanted)
        console.print(f"rl: {wanted} prompts, {fresh} of them for the first time in these rounds")
    dev = dev_prompts(session)
    session.rollouts.wait_for_generators()
    reference = session.starts.reference("rl")
    session.rollouts.start_scorers([*session.data.rl, *(p.prompt for p in dev)], reference, session.gold)
    link = session.rollouts.start()
    link.tell("set_prompts", prompts, session.rollouts.sampling(config.rl.draw, play=True))
    arguments = RLArguments(
        **session.loop_arguments("rl"),
        policy=start,
        value_model=session.starts.value_model,
        coordinator=link.remote,
        setup=link.setup,
        plugin=session.plugin,
        dev=put(dev, session.local),
    )
    session.train("rl", rl_loop, arguments)


def dev_prompts(session: Session) -> list[DevPrompt]:
    """The dev prompts that the policy answers while it trains, the first ones.

    Raises:
        UserError: it is to be evaluated on some, and there are none.
    """
    settings = session.config.rl
    sampled = settings.sample_prompts if settings.sample_every else 0
    evaluated = settings.eval_prompts if settings.eval_every else 0
    prompts = session.data.rl_dev[: max(sampled, evaluated)]
    if settings.eval_every and not prompts:
        raise UserError("rl.eval_every: there are no dev prompts; raise data.dev_fraction")
    return [DevPrompt(encoded, prompt) for encoded, prompt in zip(session.data.prompts(prompts), prompts, strict=True)]


if __name__ == "__main__":
    main(rl)
