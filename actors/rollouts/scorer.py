"""The scorer: an actor that holds the frozen models, the reward model and the reference policy."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch

from actors.pools.remote import SerializedCalls, this_node
from rayrlhf.config import ScorerConfig
from rayrlhf.models.attention import packs
from rayrlhf.models.batching import Row, token_batches
from rayrlhf.models.loading import autocast, load_policy, load_reward_model
from rayrlhf.models.logprobs import token_logprobs
from rayrlhf.rewards.functions import RewardModelFunction
from rayrlhf.rewards.gold import GoldMeasure
from rayrlhf.runs.storage import local_copy
from rayrlhf.trajectory import SerializedTrajectory, Trajectory


class Scorer(SerializedCalls):
    """Adds rewards and reference log-probs to trajectories, and the gold measure where there is one."""

    def __init__(
        self,
        name: str,
        reward_model: str,
        reference: str,
        settings: ScorerConfig,
        *,
        gold: GoldMeasure | None = None,
        pad_token_id: int,
        dtype: str,
    ) -> None:
        """Both models are directories by path or URI."""
        self.name, self.settings, self.pad_token_id, self.dtype = name, settings, pad_token_id, dtype
        self.device = torch.device("cuda" if settings.gpus else "cpu")
        self.limit_threads()
        self.reward = RewardModelFunction(
            load_reward_model(local_copy(reward_model), device=self.device).requires_grad_(False),
            pad_token_id=pad_token_id,
            micro_batch_tokens=settings.micro_batch_tokens,
            dtype=dtype,
        )
        self.reference = load_policy(local_copy(reference), device=self.device).requires_grad_(False)
        self.gold = gold

    def __repr__(self) -> str:
        return self.name

    def limit_threads(self) -> None:
        """Torch's thread count is the process's: in `--local` mode other roles change it between our calls."""
        if self.device.type == "cpu":
            torch.set_num_threads(self.settings.threads)

    def ready(self) -> dict[str, Any]:
        return {"name": self.name, "pid": os.getpid(), "node": this_node()}

    def score(self, trajectories: Sequence[Trajectory], temperature: float) -> list[Trajectory]:
        """The trajectories with `rewards`, `ref_logprobs` and `gold` filled in, in order."""
        self.limit_threads()
        rewards = self.reward(trajectories)
        for i, trajectory in enumerate(trajectories):
            trajectory.rewards = {name: values[i] for name, values in rewards.items()}
            trajectory.gold = self.gold(trajectory) if self.gold else None
        rows = [Row.completion(t.prompt_ids, t.response_ids) for t in trajectories]
        for indices, batch in token_batches(
            rows, self.settings.micro_batch_tokens, self.pad_token_id, self.device, packed=packs(self.reference)
        ):
            with torch.no_grad(), autocast(self.device, self.dtype):
                logprobs = token_logprobs(self.reference, batch, temperature)
            for i, row in zip(indices, logprobs.split(batch.counts), strict=True):
                trajectories[i].ref_logprobs = row.cpu().numpy()
        return list(trajectories)

    def score_serialized(
        self, trajectories: Sequence[SerializedTrajectory], temperature: float
    ) -> list[SerializedTrajectory]:
        """`score` for who only hands them on."""
        return [
            SerializedTrajectory.of(t)
            for t in self.score([serialized.load() for serialized in trajectories], temperature)
        ]
