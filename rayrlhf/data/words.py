"""The words of a text in any script: what ROUGE compares, and what tells a nearly empty answer.

Chinese, Japanese, Thai, Lao, Khmer and Burmese are written without spaces. There each character, with the marks that
belong to it, counts as a word. That needs no dictionary and is the usual way to compute ROUGE and BLEU for them.
"""

from __future__ import annotations

import unicodedata

import regex

# Line_Break=SA is Unicode's class for the scripts of South-East Asia whose words only a dictionary can tell apart.
_UNSPACED = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{LB=SA}]"
# Accents and vowel signs that are characters of their own, and the two joiners of Persian and Indian scripts.
_MARKS = r"[\p{M}\u200c\u200d]*"
_CHARACTER = regex.compile(f"(?=[\\p{{L}}\\p{{N}}]){_UNSPACED}{_MARKS}")
_WORD = regex.compile(f"{_CHARACTER.pattern}|(?:(?!{_UNSPACED})[\\p{{L}}\\p{{N}}]{_MARKS})+")

_PIECE = regex.compile(f"\\s*(?:{_UNSPACED}{_MARKS}|(?:(?!{_UNSPACED})\\S)+)|\\s+$")


def words(text: str) -> list[str]:
    """The words of a text in lower case: runs of letters and digits, accents included.

    For plain English these are the words that the `rouge_score` package finds: "Don't!" has the words "don" and "t".
    """
    # NFC, so that an accented letter equals the same letter followed by its accent.
    return [str(word) for word in _WORD.findall(unicodedata.normalize("NFC", text.lower()))]


def count_words(text: str) -> int:
    """How long a text is: the number of pieces between spaces, in scripts without spaces the number of characters."""
    return sum(max(1, len(_CHARACTER.findall(piece))) for piece in text.split())


def pieces(text: str) -> list[str]:
    """A text cut at its blanks, and in scripts without spaces at each character; joined, the pieces are the text.

    >>> pieces("It works, 本当 ")
    ['It', ' works,', ' 本', '当', ' ']
    """
    return [str(piece) for piece in _PIECE.findall(text)]
