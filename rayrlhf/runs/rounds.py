"""A run in rounds: a folder whose rounds are ordinary run folders, each with a config that is derived from the run's.

    RUN/config.yaml     the run's config, which has `rounds`
    RUN/rounds.json     {"begun": 2, "stopped": null}: how many rounds have begun, and why there is no further one
    RUN/report.html     the rounds side by side
    RUN/round-1/        a run folder: config.yaml, sft/, comparisons.parquet, reward_model/, policy/, ...
    RUN/round-2/        another one; its sft/ is that of the first round

So every stage, its resumption and its report are those of a run without rounds. All that a round has from others is in
its config: who answers, which prompts are left, which comparisons count, which models training begins with.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from rayrlhf.config import Config
from rayrlhf.config_file import dump_config, parse_config
from rayrlhf.config_rounds import chooses_by_margin, has_margins
from rayrlhf.files import replacing
from rayrlhf.runs.addresses import join
from rayrlhf.runs.folder import RunFolder
from rayrlhf.runs.reading import read_json
from rayrlhf.runs.stages import STAGES

RECORD = "rounds.json"


def round_name(number: int) -> str:
    """The name of a round's folder; rounds count from 1."""
    return f"round-{number}"


def round_config(config: Config, number: int, run: str) -> Config:
    """The config of one round, which is that of an ordinary run.

    Args:
        config: of the run; it has `rounds`.
        number: of the round, from 1.
        run: the address of the run's folder.
    """
    assert config.rounds is not None
    tree = dump_config(config) | {"name": round_name(number), "runs_dir": run, "rounds": None}
    _anchor(tree, config, number)
    if asks_as_drawn(config, number):
        tree["collect"]["labeller"]["choose"] = "random"
    if number > 1:
        _begin_after(tree, config, number, run)
    return parse_config(tree, f"{round_name(number)} of {run}")


def asks_as_drawn(config: Config, number: int) -> bool:
    """Whether a round lacks the reward model by whose margins people are to be asked: it is the first one."""
    return number == 1 and chooses_by_margin(config) and not has_margins(config)


def _policy_stages(config: Config) -> list[str]:
    return [stage for stage in ("dpo", "rl") if config.has(stage)]


def _anchor(tree: dict[str, Any], config: Config, number: int) -> None:
    """Have all rounds the reference policy with which the first begins, which is the SFT model unless `from` is set."""
    assert config.rounds is not None
    stages = _policy_stages(config)
    first = getattr(config, stages[0])
    begins_there = number == 1 or config.rounds.policy_from == "sft"
    for stage in stages:
        compares = getattr(getattr(config, stage), "reference", True)  # SimPO has no reference policy
        if compares and tree[stage]["reference_from"] is None and not (begins_there and stage == stages[0]):
            tree[stage]["reference_from"] = first.start or "sft"


def _begin_after(tree: dict[str, Any], config: Config, number: int, run: str) -> None:
    """What a round has from the rounds before it."""
    rounds = config.rounds
    assert rounds is not None
    stages = _policy_stages(config)

    def place(earlier: int, stage: str) -> str:
        return join(run, round_name(earlier), STAGES[stage].output)

    before = range(number - 1, 0, -1)
    previous, *older = (place(each, stages[-1]) for each in before)
    if STAGES["sft"].part_of(config):
        tree["from"] = join(run, round_name(1))

    collect, answers = tree["collect"], rounds.answers
    models = [{"from": previous, "share": answers.newest + (0.0 if older else answers.earlier)}]
    if answers.earlier:
        models += [{"from": each, "share": answers.earlier / len(older)} for each in older]
    if answers.sft:
        sft = place(1, "sft") if STAGES["sft"].part_of(config) else config.sft.start
        models.append({"from": sft, "share": answers.sft})
    collect["models"] = models
    collect["skip_prompts"] = (number - 1) * config.collect.prompts
    collect["earlier"] = [
        *({"path": place(each, "collect"), "weight": rounds.age_weight ** (number - each)} for each in before),
        *collect["earlier"],
    ]
    if collect["labeller"]["kind"] == "file":  # people rank other answers in each round
        file = Path(collect["labeller"]["path"])
        collect["labeller"]["path"] = str(file.with_name(f"{file.stem}-{round_name(number)}{file.suffix}"))
    if chooses_by_margin(config):
        collect["margin_from"] = place(number - 1, "reward_model")
    if rounds.reward_model_from == "previous" and config.trains_reward_model:
        tree["reward_model"]["from"] = place(number - 1, "reward_model")
    if rounds.policy_from == "previous":
        tree[stages[0]]["from"] = previous
    tree["rl"]["skip_prompts"] = (number - 1) * config.rl.steps * config.rl.prompts_per_step
    if config.has("evaluate"):
        tree["evaluate"]["previous_from"] = previous


def has_rounds(run: RunFolder) -> bool:
    """Whether the folder is that of a run in rounds."""
    return run.read(run.path / RECORD) is not None


def rounds_of(run: RunFolder) -> list[RunFolder]:
    """The folders of the rounds that have begun, in order; none of a run without rounds."""
    begun = _record(run)["begun"]
    return [RunFolder(join(run.address, round_name(number))) for number in range(1, begun + 1)]


def newest_round(run: RunFolder) -> RunFolder:
    """The folder that has what a run is for: that of its newest round, or its own where no round has begun."""
    # A kill may have come between the note that a round begins and its folder.
    return next((each for each in reversed(rounds_of(run)) if each.read(each.config) is not None), run)


def stopped(run: RunFolder) -> str | None:
    """Why a run in rounds has ended before its last round; None if it has not."""
    found: str | None = _record(run).get("stopped")
    return found


class _Record(BaseModel):
    begun: int = Field(ge=0, le=10_000)
    stopped: str | None = None


def _record(run: RunFolder) -> dict[str, Any]:
    path = run.path / RECORD
    content = run.read(path)
    return {"begun": 0} if content is None else read_json(content, run.address_of(path), _Record)


def note_rounds(run: RunFolder, begun: int, stopped: str | None = None) -> None:
    """Write `rounds.json` of a folder that this process has locked; `begun` never falls."""
    record = {"begun": max(begun, len(rounds_of(run))), "stopped": stopped}
    path = run.path / RECORD
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(record) + "\n", encoding="utf-8")
    run.upload(path)
