"""Rewards that read texts: functions of the user's own, services, judges, reward models from elsewhere.
The scorers call them.

They differ in who computes a score. All are told the same, and each gives one score for each response.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from rayrlhf.config_resources import ScorerConfig
from rayrlhf.config_rewards import Reward
from rayrlhf.data.records import Prompt
from rayrlhf.data.tokens import decode_trajectory
from rayrlhf.rewards.base import TextReward
from rayrlhf.rewards.http import HttpScores
from rayrlhf.rewards.judge import Judge
from rayrlhf.rewards.pretrained import PretrainedModel
from rayrlhf.rewards.python import PythonFunction
from rayrlhf.trajectory import Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TextRewards:
    """All such rewards of a run, with the prompts by whose id they find text and reference of a response."""

    def __init__(
        self, rewards: Sequence[TextReward], prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self.rewards, self.tokenizer = list(rewards), tokenizer
        self.prompts = {prompt.id: prompt for prompt in prompts}

    def start(self, settings: ScorerConfig) -> None:
        """See `TextReward`."""
        for each in self.rewards:
            each.start(settings)

    def __call__(self, trajectories: Sequence[Trajectory]) -> dict[str, list[float]]:
        """Weighted scores by name, one list each in the order of the trajectories."""
        known = [self.prompts[t.prompt_id] for t in trajectories]
        told: dict[str, Sequence[Any]] = {
            "prompts": [prompt.text for prompt in known],
            "responses": [decode_trajectory(self.tokenizer, t) for t in trajectories],
            "references": [prompt.reference for prompt in known],
            "metadata": [prompt.metadata for prompt in known],
            "messages": [prompt.messages for prompt in known],
            "token_ids": [t.response_ids.tolist() for t in trajectories],
        }
        return {
            each.reward.name: [each.reward.weight * score for score in each(trajectories, told)]
            for each in self.rewards
        }


MAKERS: dict[str, Callable[[Any], TextReward]] = {
    "python": PythonFunction.read, "http": HttpScores, "judge": Judge, "model": PretrainedModel.find,
}  # fmt: skip
"""By the kind of a reward what makes one of its section. The other rewards read token ids, or none."""


def make_text_rewards(rewards: Sequence[Reward]) -> list[TextReward]:
    """Those among a config's rewards that read texts. Functions are read and tried, and models looked at.

    Raises:
        UserError: a file that cannot be read or run, a function that asks for what nobody knows, or a model that gives
            no score.
    """
    return [MAKERS[reward.kind](reward) for reward in rewards if reward.kind in MAKERS and not reward.trained]
