"""The models of a run, by the names that `chat`, `serve` and `export` know.

    base      the model that the run began with
    sft       of the stage `sft`, or the one given in its place
    dpo       of the stage `dpo`
    policy    of the stage `rl`

A run in rounds has those of its newest round; an earlier round's folder is a run of its own.
"""

from __future__ import annotations

from rayrlhf.errors import UserError
from rayrlhf.runs.addresses import as_typed
from rayrlhf.runs.folder import RunFolder, run_at, stored_config
from rayrlhf.runs.rounds import newest_round
from rayrlhf.runs.starts import Starts, find_models

BASE, POLICY, REWARD_MODEL = "base", "policy", "reward_model"


def open_run(address: str) -> RunFolder:
    """The run at an address, or its newest round.

    Raises:
        UserError: there is no run.
    """
    run = newest_round(run_at(address))
    if run.read(run.config) is None:
        raise UserError(f"{address}: no run folder (it has no config.yaml)")
    return run


def policies_of(run: RunFolder) -> dict[str, str]:
    """The addresses of the language models that a run has by now, by name, in the order in which they build on another.

    Raises:
        UserError: a model that the config names is gone.
    """
    config = stored_config(run)
    starts = Starts(config, run, find_models(config))
    found = {BASE: starts.base}
    if starts.sft and (run.done("sft") or "sft.from" in starts.given):
        found["sft"] = starts.sft
    for name, stage in (("dpo", "dpo"), (POLICY, "rl")):
        if run.done(stage):
            found[name] = run.address_of(run.output(stage))
    if found.get("sft") == found[BASE]:
        del found[BASE]  # the run began with a model that was fine-tuned elsewhere
    return found


def chosen(run: RunFolder, names: str | None) -> dict[str, str]:
    """Those of a run's language models that a comma-separated list names; without one all but the base.

    Raises:
        UserError: the run has no model of that name, or a file of one is damaged.
    """
    found = policies_of(run)
    if names is None:
        names = ",".join([name for name in found if name != BASE] or found)
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    for name in wanted:
        if name not in found:
            raise UserError(f"{as_typed(run.address)} has no model {name!r}; it has: {', '.join(found)}")
        _require_whole(run, name)
    if not wanted:
        raise UserError(f"--models names no model; the run has: {', '.join(found)}")
    return {name: found[name] for name in dict.fromkeys(wanted)}


def reward_model_of(run: RunFolder) -> str | None:
    """The address of the run's reward model; None if it has none, or none yet."""
    config = stored_config(run)
    if config.trains_reward_model:
        return run.address_of(run.reward_model) if run.done(REWARD_MODEL) else None
    return Starts(config, run, find_models(config)).reward_model


def model_of(run: RunFolder, name: str) -> str:
    """The address of one model, the reward model included.

    Raises:
        UserError: the run has no model of that name, or a file of it is damaged.
    """
    found: dict[str, str] = policies_of(run)
    if reward := reward_model_of(run):
        found[REWARD_MODEL] = reward
    if name not in found:
        raise UserError(f"{as_typed(run.address)} has no model {name!r}; it has: {', '.join(found)}")
    _require_whole(run, name)
    return found[name]


def _require_whole(run: RunFolder, name: str) -> None:
    """
    Raises:
        UserError: the run has trained the model, and one of its files was damaged since.
    """
    stage = "rl" if name == POLICY else name
    if stage != BASE and run.done(stage):
        run.require_whole(stage)
