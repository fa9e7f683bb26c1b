"""Rewards that read texts: functions of the user's own, services, judges. The scorers call them.

They differ in who computes a score. All are told the same, and each gives one score for each response.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from rayrlhf.config_rewards import HttpReward, JudgeReward, PythonReward, Reward
from rayrlhf.data.records import Prompt
from rayrlhf.data.tokens import decode_trajectory
from rayrlhf.plugins import Plugin
from rayrlhf.rewards.http import HttpScores
from rayrlhf.rewards.judge import Judge
from rayrlhf.rewards.python import PythonFunction
from rayrlhf.trajectory import Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TextReward(Protocol):
    """One reward of the config."""

    @property
    def reward(self) -> PythonReward | HttpReward | JudgeReward:
        """Its section, which has name and weight."""

    @property
    def plugin(self) -> Plugin | None:
        """The user's file, whose text belongs to what a checkpoint was trained with."""

    def __call__(self, trajectories: Sequence[Trajectory], told: Mapping[str, Sequence[Any]]) -> list[float]:
        """A score for each trajectory, without its weight.

        Args:
            trajectories: for their ids in errors, and for what a score cost.
            told: lists with one entry for each trajectory, by the names in `rayrlhf.rewards.python.TOLD`.

        Raises:
            UserError: no finite score for a response; the message names reward, prompt and sample.
        """


class TextRewards:
    """All such rewards of a run, with the prompts by whose id they find text and reference of a response."""

    def __init__(
        self, rewards: Sequence[TextReward], prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self.rewards, self.tokenizer = list(rewards), tokenizer
        self.prompts = {prompt.id: prompt for prompt in prompts}

    def __call__(self, trajectories: Sequence[Trajectory]) -> dict[str, list[float]]:
        """Weighted scores by name, one list each in the order of the trajectories."""
        known = [self.prompts[t.prompt_id] for t in trajectories]
        told: dict[str, Sequence[Any]] = {
            "prompts": [prompt.text for prompt in known],
            "responses": [decode_trajectory(self.tokenizer, t) for t in trajectories],
            "references": [prompt.reference for prompt in known],
            "token_ids": [t.response_ids.tolist() for t in trajectories],
        }
        return {
            each.reward.name: [each.reward.weight * score for score in each(trajectories, told)]
            for each in self.rewards
        }


def make_text_rewards(rewards: Sequence[Reward]) -> list[TextReward]:
    """Those among a config's rewards that read texts. Functions are read and tried.

    Raises:
        UserError: a file that cannot be read or run, or a function that asks for what nobody knows.
    """
    found: list[TextReward] = []
    for reward in rewards:
        if isinstance(reward, PythonReward):
            function = PythonFunction(reward, Plugin.read(reward.path, f"rewards: {reward.name}"))
            function.load()
            found.append(function)
        elif isinstance(reward, HttpReward):
            found.append(HttpScores(reward))
        elif isinstance(reward, JudgeReward):
            found.append(Judge(reward))
    return found
