"""The words of texts in many scripts, by a table made by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.tokenizers import DefaultTokenizer

from rayrlhf.data.words import count_words, words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Don't stop – it's 3.5 km, snake_case!", ["don", "t", "stop", "it", "s", "3", "5", "km", "snake", "case"]),
        ("Größere ÄPFEL süß", ["größere", "äpfel", "süß"]),
        ("été e\u0301te\u0301", ["été", "été"]),  # accents as characters of their own
        ("сосед почистил сад", ["сосед", "почистил", "сад"]),
        ("叶绿素 iPhone9很好。", ["叶", "绿", "素", "iphone9", "很", "好"]),
        ("はい、コー", ["は", "い", "コ", "ー"]),
        ("น้ำดี", ["น้", "ำ", "ดี"]),  # a vowel sign above and a tone mark belong to their letter
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("می\u200cخواهم", ["می\u200cخواهم"]),
        ("한국어 문장", ["한국어", "문장"]),
        ("… 😀 —", []),
    ],
)
def test_words_by_hand(text: str, expected: list[str]) -> None:
    assert words(text) == expected


@given(st.text(st.characters(max_codepoint=127)))
def test_plain_english_has_the_words_that_rouge_score_finds(text: str) -> None:
    assert words(text) == DefaultTokenizer(use_stemmer=False).tokenize(text)


@given(st.text(st.characters(max_codepoint=0x2000)))
def test_spaces_alone_count_where_scripts_have_them(text: str) -> None:
    """Below U+2000 only the scripts of South-East Asia, from Thai to Khmer, do without."""
    spaced = "".join("x" if "\u0e00" <= c <= "\u1aff" else c for c in text)
    assert count_words(spaced) == len(spaced.split())


@pytest.mark.parametrize(
    ("text", "count"), [("", 0), ("I don't know, sorry :-)", 5), ("因为天气。", 4), ("很好 OK", 3), ("ดีมาก", 4)]
)
def test_length_by_hand(text: str, count: int) -> None:
    assert count_words(text) == count
