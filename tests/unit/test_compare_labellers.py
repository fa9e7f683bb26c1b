"""scripts/compare_labellers.py: what an answer is compared with, and what a preference is."""

from __future__ import annotations

import random

import pytest

from rayrlhf.data.records import Demonstration
from scripts.compare_labellers import cases, first_sentence, measures, preferences, repeated, shuffled, table

RECORDS = [
    Demonstration(
        str(i),
        f"SUBREDDIT: r/music\n\nTITLE: My {word}\n\nPOST: I dropped my {word}. It broke!\n\nTL;DR:",
        f"dropped the {word} and it broke",
        title=f"My {word} fell",
    )
    for i, word in enumerate(("banjo", "violin", "piano"))
]
ANSWERS = {"sft": {str(i): "I want to get a job" for i in range(3)}}


def test_worse_answers_by_hand() -> None:
    assert first_sentence(RECORDS[0].text) == "I dropped my banjo."
    assert repeated("dropped the banjo and it") == "dropped the banjo dropped the" and repeated("") == ""
    mixed = shuffled("a b c d e f", random.Random(0))
    assert mixed != "a b c d e f" and sorted(mixed) == sorted("a b c d e f")
    assert shuffled("a a", random.Random(0)) == "a a"


@pytest.mark.parametrize("swap", [False, True])
def test_a_case_never_compares_an_answer_with_itself(swap: bool) -> None:
    found = cases(RECORDS, ANSWERS, swap)
    summaries, titles = {r.reference for r in RECORDS}, {r.title for r in RECORDS}
    for case in found:
        assert (case.good in titles, case.reference in summaries) == (swap, swap)
        assert case.good != case.worse["of another post"]
        assert case.worse["of another post"] in (titles if swap else summaries)
        assert case.worse["sft"] == "I want to get a job"
    assert len({case.post for case in found}) == 3


def test_preferences_are_shares_of_the_posts_and_a_tie_is_half() -> None:
    found = cases(RECORDS, ANSWERS, swap=False)
    longest = preferences(lambda case, answer: len(answer.split()), found)
    means = {name: value.mean for name, value in longest.items() if value is not None}
    assert means == {  # a TL;DR has 6 words, as the answers of SFT have; a first sentence has 4
        "shuffled": 0.5, "of another post": 0.5, "repeated phrase": 0.5, "first sentence": 1.0, "sft": 0.5,
    }  # fmt: skip
    candidates = measures(RECORDS)
    by_words = {name: preferences(candidates[name], found) for name in ("content (posts and TL;DRs)", "ROUGE-1")}
    for row in by_words.values():
        assert row["shuffled"] is not None and row["shuffled"].mean == 0.5, "words without an order"
        assert row["of another post"] is not None and row["of another post"].mean == 1.0, "it names the instrument"
    assert table("measure", by_words).count("\n") == 3
