"""A reward by a judge: a language model behind an OpenAI-compatible endpoint, with a rubric of yours.

    compare: nothing      one question, "how good is this answer from 0 to 10"                       score / 10
    compare: reference    two questions, "which is better", with both orders of answer and reference  share of wins

A judge tends to prefer the answer that it reads first, or second: each pair is asked both ways round.
A question without a usable reply counts as 0, the worst, so that no policy gains by confusing the judge.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rayrlhf.config_rewards import JudgeReward
from rayrlhf.errors import UserError
from rayrlhf.rewards.base import TextReward
from rayrlhf.rewards.judge_client import JudgeClient, Verdict
from rayrlhf.rewards.judge_questions import Question, prefer, rate
from rayrlhf.trajectory import Trajectory

TOKENS, UNUSABLE = "judge_tokens", "judge_unusable"
"""What `Trajectory.counted` calls the tokens that judges have read and written, and questions without a usable reply.
"""


class Judge(TextReward):
    """One judge, and what it has said."""

    reward: JudgeReward

    def __init__(self, reward: JudgeReward) -> None:
        self.reward = reward
        self.client = JudgeClient(reward, f"reward {reward.name!r}")

    def __call__(self, trajectories: Sequence[Trajectory], told: Mapping[str, Sequence[Any]]) -> list[float]:
        asked = [
            self._questions(t, p, r, reference)
            for t, p, r, reference in zip(
                trajectories, told["prompts"], told["responses"], told["references"], strict=True
            )
        ]
        verdicts = iter(self.client.ask([question for own in asked for question in own]))
        return [self._score(t, [next(verdicts) for _ in own]) for t, own in zip(trajectories, asked, strict=True)]

    def _questions(self, trajectory: Trajectory, prompt: str, response: str, reference: str | None) -> list[Question]:
        rubric = self.reward.rubric
        about = f"prompt {trajectory.prompt_id!r}, sample {trajectory.sample_index}"
        if self.reward.compare == "nothing":
            return [rate(rubric, prompt, response, about)]
        if reference is None:
            raise UserError(
                f"{self.client.place}: prompt {trajectory.prompt_id!r} has no reference to compare with; "
                "set compare: nothing"
            )
        return [prefer(rubric, prompt, response, reference, about), prefer(rubric, prompt, reference, response, about)]

    def _score(self, trajectory: Trajectory, verdicts: Sequence[Verdict]) -> float:
        """From 0 to 1; adds to the trajectory what it cost."""
        first, *second = [verdict.value for verdict in verdicts]
        # In the second question the reference stood first.
        values = [first, *(None if value is None else 1 - value for value in second)]
        for name, count in ((TOKENS, sum(verdict.tokens for verdict in verdicts)), (UNUSABLE, values.count(None))):
            trajectory.counted[name] = trajectory.counted.get(name, 0) + count
        return sum(value or 0.0 for value in values) / len(values)
