"""The stems of a text's words: what every measure of words compares."""

from __future__ import annotations

import functools
from typing import Any

from rayrlhf.data.words import words


def stems(text: str) -> list[str]:
    """The words of a text of any script, lower-cased; those of more than three letters are stemmed (for English).

    >>> stems("The cats were running")
    ['the', 'cat', 'were', 'run']
    """
    return [_stem(word) if len(word) > 3 else word for word in words(text)]


@functools.lru_cache(1 << 16)
def _stem(word: str) -> str:
    return str(_porter().stem(word))


@functools.cache
def _porter() -> Any:
    # Heavy import; only processes that measure texts pay for it.
    from nltk.stem.porter import PorterStemmer

    return PorterStemmer()
