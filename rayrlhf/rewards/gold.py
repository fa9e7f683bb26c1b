"""The gold measure: the labeller's own measure of sampled responses.

`rl` maximises the reward model, which is a proxy of the labeller. Watching both over the steps shows where they part
(Gao et al. 2023, Scaling Laws for Reward Model Overoptimization). Nothing is ever trained on the gold measure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rayrlhf.config import Config
from rayrlhf.config_labellers import LabellerConfig, ReferenceLabellerConfig
from rayrlhf.data.records import Prompt
from rayrlhf.data.tokens import decode_trajectory
from rayrlhf.rewards.content import Vocabulary
from rayrlhf.rewards.diversity import wording
from rayrlhf.rewards.labeller import Labeller
from rayrlhf.rewards.labellers import make_labeller
from rayrlhf.trajectory import Trajectory, Wording

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def gold_labeller(config: Config, vocabulary: Vocabulary) -> Labeller | None:
    """The labeller whose measure is `gold`; None in a run with an environment, whose trajectories are no answers.

    It is the one that ranked the answers. People cannot be asked during training, and a judge would have to be paid
    for each response, so the words of the reference stand in for them.

    Args:
        config: of the run.
        vocabulary: how common words are in the run's demonstrations.
    """
    if config.environment:
        return None
    return make_labeller(_section(config), vocabulary)


def gold_names(config: Config) -> dict[str, str]:
    """What `gold` is, and which other measure of the evaluation is never used for ranking: the check on it."""
    section = _section(config)
    gold = section.measure if isinstance(section, ReferenceLabellerConfig) else section.kind
    return {"gold": gold, "gold_check": "content_words_in_post" if gold == "rouge_l" else "rougeL"}


def gold_measures(
    labeller: Labeller | None, prompts: Sequence[Prompt], texts: Sequence[str | None]
) -> list[float] | None:
    """[n] the labeller's own measure of each answer, NaN where it has none; None without a labeller."""
    if labeller is None:
        return None
    measured = [None if text is None else labeller.measure(p, text) for p, text in zip(prompts, texts, strict=True)]
    return [math.nan if value is None else value for value in measured]


def _section(config: Config) -> LabellerConfig:
    """Of the labeller whose measure is `gold`."""
    ranked = config.data.comparisons is None and config.collect.labeller.measures
    return config.collect.labeller if ranked else ReferenceLabellerConfig()


class GoldMeasure:
    """What is watched of a response's text and never trained on: the labeller's measure, and how it is worded."""

    def __init__(self, labeller: Labeller, prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase) -> None:
        """The labeller finds the reference of a response by the id of its prompt."""
        self.labeller, self.tokenizer = labeller, tokenizer
        self.prompts = {prompt.id: prompt for prompt in prompts}

    def __call__(self, trajectory: Trajectory) -> tuple[float | None, Wording]:
        """Measure the response's text; gold is None if the prompt is unknown or the labeller has no measure of it."""
        text, prompt = decode_trajectory(self.tokenizer, trajectory), self.prompts.get(trajectory.prompt_id)
        gold = None if prompt is None else self.labeller.measure(prompt, text)
        return gold, wording(text)
