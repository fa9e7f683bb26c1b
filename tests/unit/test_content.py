"""The measure of content words, by hand."""

from __future__ import annotations

import math

import pytest

from rayrlhf.config_file import parse_config
from rayrlhf.data.records import Demonstration, Prompt
from rayrlhf.rewards.content import EXAMPLES, Vocabulary, content, faithfulness, overlap
from rayrlhf.rewards.gold import gold_labeller, gold_names
from rayrlhf.rewards.labellers import make_labeller
from rayrlhf.rewards.stems import stems

# Three documents: "the" is in all of them and weighs nothing, "cat" weighs log(4 / 3), a word of one log 2, an unknown
# one log 4 = 2 log 2.
SMALL = Vocabulary.of(["The cats sat.", "the cat ran the race", "the banjo"])
CAT, ONE, NEW = math.log(4 / 3), math.log(2), math.log(4)


def test_words_weigh_by_how_few_documents_have_them() -> None:
    assert SMALL.documents == 3 and stems("The cats ran races") == ["the", "cat", "ran", "race"]
    weights = {"the": 0.0, "cat": CAT, "banjo": ONE, "violin": NEW}
    assert {word: SMALL.weight(word) for word in weights} == pytest.approx(weights)
    assert Vocabulary().weight("the") == 1.0  # where nothing is known all words weigh alike


@pytest.mark.parametrize(
    ("reference", "answer", "expected"),
    [
        ("the banjo", "a banjo", 2 * ONE / (ONE + NEW + ONE)),  # "a" is in no document
        ("the cat", "The cats!", 1.0),
        ("the banjo", "banjo banjo banjo", 2 * ONE / (ONE + 3 * ONE)),  # said once in the reference: counted once
        ("banjo race", "race banjo", 1.0),
        ("the banjo", "the the the", 0.0),
        ("the", "the", 0.0),  # nothing weighs
        ("the banjo", "", 0.0),
    ],
)
def test_overlap_is_a_weighted_f1(reference: str, answer: str, expected: float) -> None:
    assert overlap(SMALL, reference, answer) == pytest.approx(expected)
    assert overlap(SMALL, answer, reference) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prompt", "answer", "expected"),
    [
        ("My banjo fell.", "the banjo", 1.0),
        ("My banjo fell.", "the banjo race", ONE / (2 * ONE)),
        ("My banjo fell.", "banjo banjo banjo", 1 / 3),  # repeating what stands there is no summary
        ("My banjo fell.", "the the", 0.0),
        ("My banjo fell.", "", 0.0),
        ("", "banjo", 0.0),
    ],
)
def test_faithfulness_is_a_share_of_what_was_said(prompt: str, answer: str, expected: float) -> None:
    assert faithfulness(SMALL, prompt, answer) == pytest.approx(expected)


def test_content_is_two_parts_reference_and_one_part_prompt() -> None:
    assert content(SMALL, "My banjo fell.", "the race", "the banjo race") == pytest.approx(
        2 / 3 * (2 * ONE / (ONE + 2 * ONE)) + 1 / 3 * (1 / 2)
    )
    assert content(SMALL, "banjo", "banjo", "banjo") == 1.0


def test_words_of_the_template_weigh_nothing() -> None:
    """A policy that repeats them would be praised for naming what stands in the prompt."""
    records = [Demonstration(str(i), f"POST: word{i}\n\nTL;DR:", f"answer{i}") for i in range(3)]
    vocabulary = Vocabulary.of_demonstrations(records)
    assert faithfulness(vocabulary, records[0].text, "post tl dr") == 0.0
    assert faithfulness(vocabulary, records[0].text, "post word0 tl dr") == 1.0


@pytest.mark.parametrize(("records", "documents"), [(0, 0), (1, 1), (EXAMPLES, EXAMPLES), (EXAMPLES + 2, 2049)])
def test_many_demonstrations_are_sampled_evenly(records: int, documents: int) -> None:
    found = Vocabulary.of_demonstrations([Demonstration(str(i), "a", "b") for i in range(records)])
    assert found.documents == documents


def test_function_words_are_those_of_many_responses() -> None:
    records = [Demonstration(str(i), "My banjo fell.", f"the answer{i}") for i in range(40)]
    vocabulary = Vocabulary.of_demonstrations(records)
    assert vocabulary.function_words == {"the"}, "the words of the prompts are in all documents, but in no response"
    assert vocabulary.content_words("My banjo fell the", "the banjo") == 1


def test_content_words_are_counted_once_each() -> None:
    vocabulary = Vocabulary.of([*["the cat"] * 4, *[f"word{i}" for i in range(96)]])  # in 4 %: function words
    assert vocabulary.content_words("The cat and the banjo race", "the cat the banjo, banjo races, violin") == 2


def test_the_labeller_ranks_and_measures_by_content_unless_told_otherwise() -> None:
    prompt = Prompt("a", "My banjo fell.", "the race")
    answers = ["the", "race", "the banjo", "race banjo"]
    scores = [content(SMALL, prompt.text, "the race", answer) for answer in answers]
    config = parse_config({"name": "run"}, "test")
    labeller = make_labeller(config.collect.labeller, SMALL)
    assert labeller.rank(prompt, answers).scores == pytest.approx(scores)
    assert labeller.rank(prompt, answers).order == (1, 3, 2, 0)
    gold = gold_labeller(config, SMALL)
    assert gold is not None and gold.measure(prompt, "race") == pytest.approx(2 / 3)
    assert gold_names(config) == {"gold": "content", "gold_check": "rougeL"}

    by_rouge = parse_config({"name": "run", "collect": {"labeller": {"measure": "rouge_l"}}}, "test")
    assert make_labeller(by_rouge.collect.labeller, SMALL).measure(prompt, "the") == pytest.approx(2 / 3)
    assert gold_names(by_rouge) == {"gold": "rouge_l", "gold_check": "content_words_in_post"}


def test_people_are_stood_in_for_by_content() -> None:
    people = parse_config({"name": "run", "collect": {"labeller": {"kind": "people"}}}, "test")
    given = parse_config(
        {
            "name": "run",
            "data": {"comparisons": {"path": "pairs.jsonl"}},
            "collect": {"labeller": {"kind": "reference", "measure": "rouge_l"}},
        },
        "test",
    )
    assert gold_names(people) == gold_names(given) == {"gold": "content", "gold_check": "rougeL"}
