"""What a reward is that reads texts; `rayrlhf.rewards.texts` has all of a run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from rayrlhf.config_resources import ScorerConfig
from rayrlhf.config_rewards import RewardSection
from rayrlhf.plugins import Plugin
from rayrlhf.trajectory import Trajectory


class TextReward(ABC):
    """One reward of the config. The driver makes it, and the scorers, which get it pickled, call it."""

    reward: RewardSection
    """Its section, which has name and weight."""
    plugin: Plugin | None = None
    """The user's file, whose text belongs to what a checkpoint was trained with."""
    bytes: int = 0
    """Memory of the weights that it holds in a scorer."""

    def start(self, settings: ScorerConfig) -> None:  # noqa: B027 - most have nothing to do
        """Get ready in a scorer with these settings, before the first call.

        Raises:
            UserError: it cannot be called there.
        """

    @abstractmethod
    def __call__(self, trajectories: Sequence[Trajectory], told: Mapping[str, Sequence[Any]]) -> list[float]:
        """A score for each trajectory, without its weight.

        Args:
            trajectories: for their ids in errors, and for what a score cost.
            told: lists with one entry for each trajectory, by the names in `rayrlhf.rewards.python.TOLD`, and
                `messages`, the dialogue of each prompt.

        Raises:
            UserError: no finite score for a response; the message names reward, prompt and sample.
        """
