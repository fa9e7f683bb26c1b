"""The scorer: an actor that computes the rewards, and holds the frozen models: reward model and reference policy."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from actors.pools.remote import SerializedCalls, this_node
from rayrlhf.config_resources import ScorerConfig
from rayrlhf.config_rewards import EnvironmentReward, ModelReward, Reward
from rayrlhf.data.rows import Row
from rayrlhf.rewards.gold import GoldMeasure
from rayrlhf.rewards.texts import TextRewards
from rayrlhf.runs.storage import local_copy
from rayrlhf.trajectory import SerializedTrajectory, Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rayrlhf.rewards.functions import RewardFunction


class Scorer(SerializedCalls):
    """Adds rewards and reference log-probs to trajectories, and the gold measure where there is one."""

    def __init__(
        self,
        name: str,
        reward_model: str | None,
        reference: str,
        settings: ScorerConfig,
        *,
        rewards: Sequence[Reward] = (ModelReward(),),
        texts: TextRewards | None = None,
        gold: GoldMeasure | None = None,
        pad_token_id: int,
        dtype: str,
    ) -> None:
        """
        Args:
            reward_model: a directory by path or URI; None if no reward needs one.
            reference: another directory.
            rewards: of the config, for the weights of the reward model and of the environment.
            texts: the rewards that read texts, if there are any.
        """
        # Here, because the coordinator imports this file for the class alone: transformers takes seconds.
        import torch

        from rayrlhf.models.forward import Forward
        from rayrlhf.models.loading import load_policy, load_reward_model
        from rayrlhf.rewards.functions import RewardModelFunction

        self.name, self.settings = name, settings
        self.device = torch.device("cuda" if settings.gpus else "cpu")
        self.limit_threads()

        def forward(model: PreTrainedModel) -> Forward:
            tokens = settings.micro_batch_tokens
            return Forward(model.requires_grad_(False), pad_token_id=pad_token_id, max_tokens=tokens, dtype=dtype)

        self.rewards: list[RewardFunction] = []
        self.environment = next((reward for reward in rewards if isinstance(reward, EnvironmentReward)), None)
        for reward in rewards:
            if reward.trained:
                assert reward_model is not None, "of the stage `reward_model`"
                model = forward(load_reward_model(local_copy(reward_model), device=self.device))
                self.rewards.append(RewardModelFunction(model, reward.name, reward.weight))
        if texts is not None:
            texts.start(settings)
            self.rewards.append(texts)
        self.reference = forward(load_policy(local_copy(reference), device=self.device))
        self.gold = gold

    def __repr__(self) -> str:
        return self.name

    def limit_threads(self) -> None:
        """Torch's thread count is the process's: in `--local` mode other roles change it between our calls."""
        import torch

        if self.device.type == "cpu":
            torch.set_num_threads(self.settings.threads)

    def ready(self) -> dict[str, Any]:
        return {"name": self.name, "pid": os.getpid(), "node": this_node()}

    def score(self, trajectories: Sequence[Trajectory], temperature: float) -> list[Trajectory]:
        """The trajectories with `rewards`, `ref_logprobs`, `gold` and `wording` filled in, in order."""
        self.limit_threads()
        rewards = {name: scores for reward in self.rewards for name, scores in reward(trajectories).items()}
        for i, trajectory in enumerate(trajectories):
            trajectory.rewards = {name: values[i] for name, values in rewards.items()}
            if self.environment is not None:
                own = trajectory.environment_reward or 0.0  # a given text was not played
                trajectory.rewards[self.environment.name] = self.environment.weight * own
            trajectory.gold, trajectory.wording = self.gold(trajectory) if self.gold else (None, None)
        rows = [Row.of(t) for t in trajectories]
        for trajectory, logprobs in zip(trajectories, self.reference.row_logprobs(rows, temperature), strict=True):
            trajectory.ref_logprobs = logprobs.cpu().numpy()
        return list(trajectories)

    def score_serialized(
        self, trajectories: Sequence[SerializedTrajectory], temperature: float
    ) -> list[SerializedTrajectory]:
        """`score` for callers that only pass trajectories on: serialized in, serialized out."""
        return [
            SerializedTrajectory.of(t)
            for t in self.score([serialized.load() for serialized in trajectories], temperature)
        ]
