"""What an answer says, by its words: whether they are those of the reference, and whether they stand in the prompt.

ROUGE counts all words alike, and most of what it finds are function words. Here a word weighs as much as it tells: its
inverse document frequency (Sparck Jones 1972, A Statistical Interpretation of Term Specificity).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from rayrlhf.data.records import Demonstration
from rayrlhf.rewards.stems import stems

EXAMPLES = 4096
"""Demonstrations that tell how common words are. More of them cost time and hardly change a weight."""
COMMON = 0.03
"""A word that is in a larger share of the responses is a function word: it says nothing of what a text is about."""
FAITHFULNESS = 1 / 3
"""The weight of the words that stand in the prompt, beside that of the words of the reference."""


@dataclass(frozen=True)
class Vocabulary:
    """How common each word is among demonstrations."""

    documents: int = 0
    frequency: Mapping[str, int] = field(default_factory=dict)
    """In how many of them a word is, by its stem."""
    function_words: frozenset[str] = frozenset()

    @classmethod
    def of(cls, texts: Iterable[str]) -> Vocabulary:
        """That of texts."""
        found = [set(stems(text)) for text in texts]
        counts = Counter(word for each in found for word in each)
        common = frozenset(word for word, count in counts.items() if count > COMMON * len(found))
        return cls(len(found), counts, common)

    @classmethod
    def of_demonstrations(cls, records: Sequence[Demonstration]) -> Vocabulary:
        """That of prompts with responses, and the function words of the responses.

        Words of a template are in all prompts, and so weigh nothing. Of many records, `EXAMPLES` or fewer are read,
        evenly over all.
        """
        chosen = list(records[:: max(1, math.ceil(len(records) / EXAMPLES))])
        responses = cls.of(record.reference for record in chosen)
        whole = cls.of(f"{record.text} {record.reference}" for record in chosen)
        return replace(whole, function_words=responses.function_words)

    def weight(self, word: str) -> float:
        """The inverse document frequency, nats; 0 of a word that is in every document. All are 1 without documents."""
        return math.log((self.documents + 1) / (self.frequency.get(word, 0) + 1)) if self.documents else 1.0

    def content_words(self, prompt: str, answer: str) -> int:
        """How many different words of an answer, function words aside, stand in its prompt."""
        return len((set(stems(answer)) & set(stems(prompt))) - self.function_words)


def overlap(vocabulary: Vocabulary, reference: str, answer: str) -> float:
    """F1 of the words of an answer and its reference, each word by its weight; in [0, 1], 0 if nothing weighs."""
    expected, given = Counter(stems(reference)), Counter(stems(answer))
    common, total = _weight(vocabulary, expected & given), _weight(vocabulary, expected) + _weight(vocabulary, given)
    return 2 * common / total if total else 0.0


def faithfulness(vocabulary: Vocabulary, prompt: str, answer: str) -> float:
    """The share of an answer's words, by their weight, that stand in the prompt; in [0, 1], 0 if nothing weighs.

    A word counts once: saying it again adds to all, not to what stands there.
    """
    there, given = set(stems(prompt)), Counter(stems(answer))
    total = _weight(vocabulary, given)
    return sum(vocabulary.weight(word) for word in given if word in there) / total if total else 0.0


def content(vocabulary: Vocabulary, prompt: str, reference: str, answer: str) -> float:
    """Two thirds `overlap` with the reference, one third `faithfulness` to the prompt; in [0, 1]."""
    shares = overlap(vocabulary, reference, answer), faithfulness(vocabulary, prompt, answer)
    return (1 - FAITHFULNESS) * shares[0] + FAITHFULNESS * shares[1]


def _weight(vocabulary: Vocabulary, counts: Mapping[str, int]) -> float:
    return sum(vocabulary.weight(word) * count for word, count in counts.items())
