"""How much answers repeat themselves and one another, in words: what a policy that collapses shows first.

- `repetition` of an answer: the share of its 4-grams that it has had before, 1 - different / all (seq-rep-4, Welleck et
  al. 2020, Neural Text Generation with Unlikelihood Training).
- `distinct_2` of several answers: different 2-grams / all (Li et al. 2016, A Diversity-Promoting Objective Function).
  More answers and longer ones have less of it, so compare it between equally many.
- `common_opening`: the share of the answers whose first four words are the commonest ones.
"""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Sequence

import numpy as np

from rayrlhf.data.words import words
from rayrlhf.trajectory import Wording

REPEATED, OPENING = 4, 4
"""Words of the n-grams that may repeat, and of an opening."""


def repetition(text: str) -> float:
    """The share of an answer's 4-grams that it has had before; 0 for one that is too short to have any.

    >>> repetition("a b c d a b c d")  # abcd bcda cdab dabc abcd
    0.2
    """
    grams = _grams(words(text), REPEATED)
    return (len(grams) - len(set(grams))) / len(grams) if grams else 0.0


def wording(text: str) -> Wording:
    """What `distinct_2` and `common_opening` need of an answer, small enough to travel with it."""
    own = words(text)
    hashes = [_hash(gram) for gram in _grams(own, 2)]
    return Wording(repetition(text), np.array(hashes, np.uint32).tobytes(), _hash(own[:OPENING]))


def distinct_2(answers: Sequence[Wording]) -> float | None:
    """Different 2-grams as a share of all 2-grams of all answers; None if there are none."""
    grams = np.frombuffer(b"".join(answer.bigrams for answer in answers), np.uint32)
    return len(np.unique(grams)) / len(grams) if len(grams) else None


def common_opening(answers: Sequence[Wording]) -> float:
    """The share of the answers that begin with the commonest four words. A shorter one counts as a whole."""
    return max(Counter(answer.opening for answer in answers).values()) / len(answers)


def diversity(answers: Sequence[Wording]) -> dict[str, float]:
    """All three of at least one answer, by name; no `distinct_2` where no answer has two words."""
    distinct = distinct_2(answers)
    return {
        "repetition": sum(answer.repetition for answer in answers) / len(answers),
        **({"distinct_2": distinct} if distinct is not None else {}),
        "common_opening": common_opening(answers),
    }


def distinct_2_without(answers: Sequence[Wording]) -> list[float]:
    """[n] `distinct_2` of all answers but each one in turn; NaN where the others have no 2-grams."""
    own = [Counter(np.frombuffer(answer.bigrams, np.uint32).tolist()) for answer in answers]
    whole = sum(own, Counter[int]())
    different, total = len(whole), whole.total()
    left = [(different - sum(n == whole[gram] for gram, n in each.items()), total - each.total()) for each in own]
    return [some / many if many else math.nan for some, many in left]


def common_opening_without(answers: Sequence[Wording]) -> list[float]:
    """[n] `common_opening` of all of at least two answers but each one in turn."""
    counts = Counter(answer.opening for answer in answers)
    (_, most), *rest = counts.most_common(2)
    second = rest[0][1] if rest else 0
    alone = second < most
    return [(most - (alone and counts[answer.opening] == most)) / (len(answers) - 1) for answer in answers]


def _grams(own: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(own[i : i + n]) for i in range(len(own) - n + 1)]


def _hash(gram: Sequence[str]) -> int:
    """Not Python's own, which differs from process to process."""
    return zlib.crc32("\x1f".join(gram).encode("utf-8", "surrogatepass"))
