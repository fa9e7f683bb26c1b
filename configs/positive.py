"""The stand-in for people of `configs/showcase.yaml`: how positive a text is, by a lexicon of sentiment.

VADER (Hutto and Gilbert 2014) adds up what people have said of 7,500 words, with rules for negation, emphasis and
punctuation. It knows words and no meaning: "I was happy to hear that he had died" is positive.
"""

from __future__ import annotations

from collections.abc import Sequence

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

_ANALYZER = SentimentIntensityAnalyzer()  # reads its lexicon once a process


def positive(responses: Sequence[str]) -> list[float]:
    """VADER's compound score of each response, from -1 (all negative) to 1 (all positive); 0 where it knows no word."""
    return [_ANALYZER.polarity_scores(text)["compound"] for text in responses]
