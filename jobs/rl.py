"""Stage `rl`: the SFT policy against the rewards. `ray job submit ... -- python -m jobs.rl --config FILE`."""

from __future__ import annotations

from actors.training.rl import RLArguments, rl_loop
from jobs.session import Session
from jobs.stage import main, stage
from rayrlhf.data.sources import as_prompts
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
    prompts = session.data.prompts(session.data.train.rl)
    if not prompts:
        raise UserError("rl: no prompts are left; lower data.sft_fraction or data.reward_model_fraction")
    session.rollouts.wait_for_generators()
    session.rollouts.start_scorers(as_prompts(session.data.train.rl), start, gold=True)
    session.rollouts.call("set_prompts", prompts, session.rollouts.sampling(config.rl.draw, play=True))
    coordinator = session.rollouts.start()
    arguments = RLArguments(
        **session.loop_arguments("rl"),
        policy=start,
        value_model=session.starts.value_model,
        coordinator=coordinator,
        plugin=session.plugin,
    )
    session.train("rl", rl_loop, arguments)


if __name__ == "__main__":
    main(rl)
