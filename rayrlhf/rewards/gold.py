"""The gold measure: what the labeller itself thinks of sampled responses.

PPO maximises the reward model, a proxy of the labeller. Watching both over training shows where they part
(Gao et al. 2023, Scaling Laws for Reward Model Overoptimization). Nothing is ever trained on the gold measure.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from rayrlhf.config import Config
from rayrlhf.data.records import Prompt
from rayrlhf.data.tokens import decode_response
from rayrlhf.rewards.labellers import Labeller, ReferenceLabeller, make_labeller
from rayrlhf.trajectory import Trajectory


def gold_labeller(config: Config) -> Labeller:
    """Whose measure is `gold`: the labeller that ranked the answers; ROUGE-L with the reference where people did."""
    if config.data.comparisons is None and config.collect.labeller.kind != "file":
        return make_labeller(config.collect.labeller)
    return ReferenceLabeller()


class GoldMeasure:
    """A labeller with the prompts that it knows."""

    def __init__(self, labeller: Labeller, prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase) -> None:
        self.labeller, self.tokenizer = labeller, tokenizer
        self.prompts = {prompt.id: prompt for prompt in prompts}

    def __call__(self, trajectory: Trajectory) -> float | None:
        """The measure of the response's text; None for another prompt, or where the labeller has no measure."""
        prompt = self.prompts.get(trajectory.prompt_id)
        if prompt is None:
            return None
        return self.labeller.measure(prompt, decode_response(self.tokenizer, trajectory.response_ids.tolist()))
