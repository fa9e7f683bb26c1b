"""What a labeller is: it ranks answers, and may measure a single one."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from rayrlhf.data.records import Prompt
from rayrlhf.rewards.content import Vocabulary
from rayrlhf.runs.folder import RunFolder


@dataclass(frozen=True)
class LabelledRanking:
    """A labeller's verdict on the K answers to one prompt."""

    order: tuple[int, ...]
    """[K] indices of the answers, best first."""
    scores: tuple[float, ...] | None
    """[K] the labeller's measure of each answer, in the order of the answers; None if it only ranks.
    Equal scores are ties: `order` puts them somewhere, but they are no preference. Nor is NaN, which stands last."""

    @property
    def unknown(self) -> bool:
        """Whether nothing is known of the answers, which is something else than a tie of all."""
        return self.scores is not None and all(map(math.isnan, self.scores))

    @classmethod
    def none(cls, count: int) -> LabelledRanking:
        """Nobody has ranked these answers."""
        return cls.by([math.nan] * count)

    @classmethod
    def by(cls, scores: Sequence[float]) -> LabelledRanking:
        """The ranking by scores; ties keep the order of sampling."""
        # NaN is neither above nor below a number, so sorting by it alone would leave any order.
        order = sorted(range(len(scores)), key=lambda i: (math.isnan(scores[i]), -scores[i]))
        return cls(tuple(order), tuple(scores))


class Labeller(ABC):
    """Says which of several answers are better."""

    name: str
    """What `comparisons.parquet` and the evaluation call it."""

    vocabulary: Vocabulary = Vocabulary()
    """How common words are in the run's demonstrations, for those that measure words; `make_labeller` sets it."""

    asks_people: ClassVar[bool] = False
    """Whether people rank outside this process: `to_rank.jsonl` keeps the answers, which are not sampled again then."""

    def prepare(  # noqa: B027 - most need nothing
        self, waiting: Sequence[tuple[Prompt, Sequence[str]]], run: RunFolder
    ) -> None:
        """Is told once all prompts and answers that `rank` will be called with: to check them, or to ask at once."""

    @abstractmethod
    def rank(self, prompt: Prompt, answers: Sequence[str]) -> LabelledRanking:
        """Rank the K answers to one prompt."""

    @abstractmethod
    def measure(self, prompt: Prompt, answer: str) -> float | None:
        """Measure one answer by itself, higher is better; None if the labeller only ranks, or lacks a reference.

        This is the gold measure of `rl` and of the evaluation.
        """

    def facts(self) -> Mapping[str, str | float]:
        """About all that was ranked, by name: `collect` prints it and writes it to `labeller.json`."""
        return {}
