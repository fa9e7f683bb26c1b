"""A labeller that asks a judge: a language model behind an OpenAI-compatible endpoint, with a rubric of yours.

compare: pairs    each two of the K answers in both orders: K (K - 1) questions; the score is the share of wins
compare: rate     each answer by itself, from 0 to 10: K questions; the score is a tenth of the number
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

from rayrlhf.config_labellers import JudgeLabellerConfig
from rayrlhf.data.records import Prompt
from rayrlhf.rewards.judge_client import JudgeClient
from rayrlhf.rewards.judge_questions import Question, prefer, rate
from rayrlhf.rewards.labeller import LabelledRanking, Labeller
from rayrlhf.runs.folder import RunFolder
from rayrlhf.terminal import say

SHOWN = 512
"""Questions after which it says how far it is."""


class Ratings:
    """Each answer by itself. One without a usable reply has the score NaN, and takes part in no pair."""

    def questions(self, rubric: str, prompt: Prompt, answers: Sequence[str]) -> list[Question]:
        """[K]"""
        return [rate(rubric, prompt.text, text, f"prompt {prompt.id!r}, answer {i}") for i, text in enumerate(answers)]

    def scores(self, values: Sequence[float | None], answers: Sequence[str]) -> list[float]:
        """[K] from the values of the K questions."""
        return [float("nan") if value is None else value for value in values]

    def facts(self) -> dict[str, float]:
        return {}


class Pairs:
    """Each two answers in both orders. A question without a usable reply is a tie, as is the reply C."""

    def __init__(self) -> None:
        self._pairs: list[tuple[float | None, float | None]] = []
        """Values of each pair's two questions."""
        self._longer: list[float] = []
        """Of each pair with a winner over both questions, whose texts differ in length: 1 if it is the longer one."""

    def questions(self, rubric: str, prompt: Prompt, answers: Sequence[str]) -> list[Question]:
        """[K (K - 1)] two after each other for each pair: the earlier answer first, then second."""
        return [
            prefer(rubric, prompt.text, answers[a], answers[b], f"prompt {prompt.id!r}, answers {a} and {b}")
            for i, j in combinations(range(len(answers)), 2)
            for a, b in ((i, j), (j, i))
        ]

    def scores(self, values: Sequence[float | None], answers: Sequence[str]) -> list[float]:
        """[K] share of wins of each answer, over its 2 (K - 1) questions; a tie is half a win."""
        count = len(answers)
        wins = [0.0] * count
        verdicts = iter(values)
        for i, j in combinations(range(count), 2):
            pair = next(verdicts), next(verdicts)
            self._pairs.append(pair)
            earlier, later = (0.5 if value is None else value for value in pair)
            # Above 0 where answer i won; the questions show it first, then second.
            won, more = earlier - later, len(answers[i]) - len(answers[j])
            if won and more:
                self._longer.append(float((won > 0) == (more > 0)))
            for value, (a, b) in zip(pair, ((i, j), (j, i)), strict=True):
                wins[a] += 0.5 if value is None else value
                wins[b] += 0.5 if value is None else 1 - value
        return [won / (2 * (count - 1)) for won in wins]

    def facts(self) -> dict[str, float]:
        """How much the judge looks at the order and at the length of the answers; one half is not at all."""
        both = [(one, other) for one, other in self._pairs if one is not None and other is not None]
        decided = [value for pair in both for value in pair if value != 0.5]
        return {
            "pairs": len(self._pairs),
            "orders_disagree": round(sum(one != 1 - other for one, other in both) / max(len(both), 1), 4),
            "first_preferred": round(sum(decided) / max(len(decided), 1), 4),
            **({"longer_preferred": round(sum(self._longer) / len(self._longer), 4)} if self._longer else {}),
        }


class JudgeLabeller(Labeller):
    """Ranks by a judge.

    Raises:
        UserError: at once, the token's environment variable is not set; later, the judge does not answer, or not with
            what it is asked for.
    """

    name = "judge"

    def __init__(self, config: JudgeLabellerConfig) -> None:
        self._config = config
        self._client = JudgeClient(config, "collect.labeller")
        self._client.check()
        self._way = Pairs() if config.compare == "pairs" else Ratings()

    def prepare(self, waiting: Sequence[tuple[Prompt, Sequence[str]]], run: RunFolder | None = None) -> None:
        """Ask all, so that questions about different prompts are under way at the same time."""
        asked = [question for prompt, answers in waiting for question in self._questions(prompt, answers)]
        say(f"{self._client.place}: {len(asked)} questions about {len(waiting)} prompts")
        for start in range(0, len(asked), SHOWN):
            if start:
                say(f"judged {start} of {len(asked)}")
            self._client.ask(asked[start : start + SHOWN])

    def rank(self, prompt: Prompt, answers: Sequence[str]) -> LabelledRanking:
        values = [verdict.value for verdict in self._client.ask(self._questions(prompt, answers))]
        return LabelledRanking.by(self._way.scores(values, answers))

    def measure(self, prompt: Prompt, answer: str) -> float | None:
        return None

    def facts(self) -> Mapping[str, str | float]:
        about = {"model": self._config.model, "url": self._config.url, "compare": self._config.compare}
        counts = {name: self._client.counts[name] for name in ("questions", "kept", "unusable", "tokens")}
        return about | counts | self._way.facts()

    def _questions(self, prompt: Prompt, answers: Sequence[str]) -> list[Question]:
        return self._way.questions(self._config.rubric, prompt, answers)
