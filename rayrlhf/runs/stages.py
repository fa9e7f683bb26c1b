"""The stages of a run, in the order in which each builds on those before it.

This table is the one place that lists them: the run folder, the commands, jobs, sweeps and reports read it. A stage of
a given name is the function `NAME` in the module `jobs.NAME`, its settings are the config's section `NAME`, and its
lines in metrics.jsonl have `"stage": NAME` and metrics `NAME/...`. Every stage numbers these lines by its finished
steps: the line that describes the first step has step 1; a line of step 0 was measured before training.

    >>> STAGES["reward_model"].command
    'reward-model'
    >>> [stage.name for stage in STAGES.values() if stage.trains]
    ['sft', 'reward_model', 'dpo', 'rl']
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rayrlhf.config import Config


@dataclass(frozen=True)
class Stage:
    """One row of the table; it imports nothing, so that the command line can read it at once."""

    name: str
    title: str
    """A heading for people."""
    summary: str
    """One or two sentences: the sub-command's help."""
    output: str
    """The file or directory in the run folder that exists exactly if the stage is done."""
    output_is_directory: bool
    starts_from: tuple[str, ...] = ()
    """The stages whose models this one may start from: it takes the first that the run has, unless its section has a
    `from`."""
    needs: tuple[str, ...] = ()
    """The stages whose outputs this one reads beside that."""
    beside: tuple[str, ...] = ()
    """Files of the run folder that it writes beside its output, some of them only in some runs."""
    trains: bool = False
    """Whether it has steps, and metrics of each."""
    left_out_with: str | None = None
    """Dotted config key: a run that sets it does without this stage."""
    for_reward_model: bool = False
    """Whether a run without a reward model does without this stage."""
    on_request: bool = False
    """Whether a run has this stage only if the config's `stages` names it."""

    @property
    def command(self) -> str:
        """The sub-command of `rayrlhf` that runs this stage."""
        return self.name.replace("_", "-")

    def inputs(self, config: Config) -> list[Stage]:
        """The stages of the run whose outputs this one reads."""
        own = [STAGES[name] for name in self.starts_from if STAGES[name].part_of(config)]
        given = getattr(getattr(config, self.name), "start", None) is not None
        others = [STAGES[name] for name in self.needs if STAGES[name].part_of(config)]
        return ([] if given else own[:1]) + others

    def part_of(self, config: Config) -> bool:
        """Whether a run with this config has the stage."""
        if config.stages is not None:
            return self.name in config.stages
        if self.on_request:
            return False
        if self.for_reward_model and not config.trains_reward_model:
            return False
        value: object = config
        for key in self.left_out_with.split(".") if self.left_out_with else ():
            value = getattr(value, key)
        return self.left_out_with is None or value is None


STAGES = {
    stage.name: stage
    for stage in (
        Stage(
            "sft",
            "Supervised fine-tuning",
            "Supervised fine-tuning on demonstrations. Keeps the checkpoint with the best ROUGE on dev posts.",
            output="sft",
            output_is_directory=True,
            trains=True,
        ),
        Stage(
            "collect",
            "Comparisons",
            "Sample answers from the SFT model and have a labeller rank them.",
            output="comparisons.parquet",
            output_is_directory=False,
            starts_from=("sft",),
            beside=("labeller.json",),
            left_out_with="data.comparisons",
            for_reward_model=True,
        ),
        Stage(
            "reward_model",
            "Reward model",
            "Train a reward model on ranked answers, starting from the SFT model.",
            output="reward_model",
            output_is_directory=True,
            starts_from=("sft",),
            needs=("collect",),
            beside=("reward_model.json", "heldout_pairs.parquet"),
            trains=True,
            for_reward_model=True,
        ),
        Stage(
            "dpo",
            "Direct preference optimisation",
            "Train the SFT policy on ranked answers by dpo.loss, without rollouts and without a reward model.",
            output="dpo",
            output_is_directory=True,
            starts_from=("sft",),
            needs=("collect",),
            trains=True,
            on_request=True,
        ),
        Stage(
            "rl",
            "RL",
            "Optimise the policy against the rewards by rl.algorithm. Continues from its last checkpoint.",
            output="policy",
            output_is_directory=True,
            starts_from=("dpo", "sft"),
            needs=("reward_model",),
            trains=True,
        ),
        Stage(
            "evaluate",
            "Evaluation",
            "Compare SFT model and policy on the test split. Writes evaluation.json, samples.parquet and report.html.",
            output="evaluation.json",
            output_is_directory=False,
            needs=("sft", "reward_model", "dpo", "rl"),
            beside=("samples.parquet",),
        ),
    )
}
"""Name to stage; iterating over it gives the names in order."""


def stages_of(config: Config) -> list[Stage]:
    """The stages that a run with this config has, in order.

    These are the ones that its `stages` names. Without `stages` they are all but `dpo`; also without `collect` where
    there are `data.comparisons`, and without `collect` and `reward_model` where no reward is a reward model.
    """
    return [stage for stage in STAGES.values() if stage.part_of(config)]


def stages_to(last: str, config: Config) -> list[str]:
    """The names of a run's stages up to and including `last`."""
    names = [stage.name for stage in stages_of(config)]
    return names[: names.index(last) + 1]


def stages_from(key: str) -> tuple[str, ...]:
    """The stages that the value of a dotted config key goes into: its own and those after it, or all.

    >>> stages_from("rl.steps")
    ('rl', 'evaluate')
    """
    names, section = tuple(STAGES), re.split(r"[.\[]", key)[0]  # rewards[0].path
    # SFT is the same whatever stages follow it, and whatever comparisons they learn from.
    section = {"rewards": "rl", "environment": "rl", "stages": "collect"}.get(section, section)
    if f"{key}.".startswith("data.comparisons."):
        section = "collect"
    return names[names.index(section) if section in STAGES else 0 :]
