"""A reward by a judge: a language model behind an OpenAI-compatible endpoint, with a rubric of yours.

    compare: nothing      one question, "how good is this answer from 0 to 10"                       score / 10
    compare: reference    two questions, "which is better", with both orders of answer and reference  share of wins

A judge tends to prefer the answer that it reads first, or second: each pair is asked both ways round.
Equal questions are asked once for as long as the scorer lives.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rayrlhf.config_rewards import JudgeReward
from rayrlhf.errors import UserError
from rayrlhf.rewards.base import TextReward
from rayrlhf.rewards.posting import post_all
from rayrlhf.trajectory import Trajectory

TOKENS = "judge_tokens"
"""What `Trajectory.counted` calls the tokens that judges have read and written."""

ALONE = """{rubric}

Question:
{prompt}

Answer:
{response}

Rate the answer. Reply with a whole number from 0 (worst) to 10 (best) and nothing else."""
PAIR = """{rubric}

Question:
{prompt}

Answer A:
{a}

Answer B:
{b}

Which answer is better? Reply with A or B and nothing else; reply with C if they are equally good."""


class Question(NamedTuple):
    text: str
    kind: str
    """`rate`, or `first` or `second` of a pair: where the response stands."""


class Judge(TextReward):
    """One judge, and what it has said."""

    reward: JudgeReward

    def __init__(self, reward: JudgeReward) -> None:
        self.reward = reward
        self._replies: dict[str, str] = {}
        """To questions that were asked before, by their text."""

    @property
    def place(self) -> str:
        return f"reward {self.reward.name!r} (judge {self.reward.model} at {self.reward.url})"

    def __call__(self, trajectories: Sequence[Trajectory], told: Mapping[str, Sequence[Any]]) -> list[float]:
        asked = [
            self._questions(t, p, r, reference)
            for t, p, r, reference in zip(
                trajectories, told["prompts"], told["responses"], told["references"], strict=True
            )
        ]
        owner = {question.text: t for t, own in zip(trajectories, asked, strict=True) for question in own}
        new = [q for q in {q.text: q for own in asked for q in own}.values() if q.text not in self._replies]
        bodies = [
            {
                "model": self.reward.model,
                "messages": [{"role": "user", "content": question.text}],
                "temperature": 0.0,
                "max_tokens": self.reward.max_tokens,
                **self.reward.body,
            }
            for question in new
        ]
        for t in trajectories:
            t.counted.setdefault(TOKENS, 0)
        for question, answer in zip(new, post_all(self.reward, self.place, bodies, "/chat/completions"), strict=True):
            trajectory = owner[question.text]
            self._replies[question.text] = self._reply(answer)
            usage = answer.get("usage") or {}
            trajectory.counted[TOKENS] += int(usage.get("total_tokens") or 0)
        return [sum(self._score(q, t) for q in own) / len(own) for t, own in zip(trajectories, asked, strict=True)]

    def _questions(self, trajectory: Trajectory, prompt: str, response: str, reference: str | None) -> list[Question]:
        rubric = self.reward.rubric
        if self.reward.compare == "nothing":
            return [Question(ALONE.format(rubric=rubric, prompt=prompt, response=response), "rate")]
        if reference is None:
            raise UserError(
                f"{self.place}: prompt {trajectory.prompt_id!r} has no reference to compare with; set compare: nothing"
            )
        return [
            Question(PAIR.format(rubric=rubric, prompt=prompt, a=response, b=reference), "first"),
            Question(PAIR.format(rubric=rubric, prompt=prompt, a=reference, b=response), "second"),
        ]

    def _reply(self, answer: Any) -> str:
        try:
            return str(answer["choices"][0]["message"]["content"]).strip()
        except (KeyError, IndexError, TypeError):
            raise UserError(f"{self.place}: no OpenAI chat completion: {str(answer)[:200]}") from None

    def _score(self, question: Question, trajectory: Trajectory) -> float:
        """From 0 to 1.

        Raises:
            UserError: the judge said something else than it was asked for.
        """
        said = self._replies[question.text]
        if question.kind == "rate":
            if number := re.match(r"(10|\d)(?!\d)", said):
                return int(number[1]) / 10
        elif verdict := re.match(r"(?:Answer )?([ABC])\b", said):
            return 0.5 if verdict[1] == "C" else float((verdict[1] == "A") is (question.kind == "first"))
        asked = "a number from 0 to 10" if question.kind == "rate" else "A, B or C"
        raise UserError(
            f"{self.place} said {said[:80]!r} of prompt {trajectory.prompt_id!r}, sample {trajectory.sample_index}; "
            f"it was asked for {asked}"
        )
