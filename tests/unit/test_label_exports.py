"""Judgements in files: rankings that `collect` reads, pairs with ties, Parquet; and rankings from files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from datasets import load_dataset

from rayrlhf.errors import UserError
from rayrlhf.labelling.database import LabelDatabase
from rayrlhf.labelling.dialogue import Turn, turns
from rayrlhf.labelling.exports import export, import_rankings, mark_gold, pairs, rankings
from rayrlhf.labelling.judgements import Item, Judgement, grouped, ungrouped

ITEMS = [Item("p0", "one?", ("a", "b", "c")), Item("p1", "two?", ("d", "e")), Item("p2", "three?", ("f", "g", "h"))]
JUDGEMENTS = [
    Judgement("p0", "ann", (3, 1, 1), flags=("harmful:0",), ratings=(None, 7, 6), note="é", shown=(2, 0, 1), at=5.0),
    Judgement("p1", "ann", None, skipped="too long", shown=(0, 1)),
    Judgement("p0", "bob", (2, 1, 3), shown=(0, 1, 2), seconds=2.5),
    Judgement("p0", "ann", (1, 2, 3), shown=(1, 0, 2), repeat=1),
]


@pytest.fixture
def database(tmp_path: Path) -> LabelDatabase:
    made = LabelDatabase(tmp_path / "labels.sqlite")
    made.add_items(ITEMS)
    return made


def test_ranks_and_groups_are_each_others_inverse() -> None:
    for ranks, groups in (((2, 2, 1), [2, [0, 1]]), ((1, 1), [[0, 1]]), ((3, 1, 2, 3), [1, 2, [0, 3]])):
        assert grouped(ranks) == groups and ungrouped(groups, len(ranks)) == ranks


@pytest.mark.parametrize(
    "ranking", [None, [0, 1], [0, 1, 1], [0, 1, 3], [0, 1, True], "012", [[0, 1], 1, 2], [0, "1", 2]]
)
def test_what_is_no_ranking_of_three(ranking: Any) -> None:
    assert ungrouped(ranking, 3) is None


def test_one_ranking_an_item() -> None:
    """ann ranks p0 [b c] a, bob b a c: b is before both others, and a and c are a tie. Her repeat does not count.

    p1 was skipped, and p2 was seen by nobody.
    """
    assert rankings(ITEMS, JUDGEMENTS) == [{"id": "p0", "ranking": [1, [0, 2]]}, {"id": "p1", "ranking": None}]
    opposite = [Judgement("p1", "ann", (1, 2)), Judgement("p1", "bob", (2, 1))]
    assert rankings(ITEMS, opposite) == [{"id": "p1", "ranking": [[0, 1]]}]


def test_pairs_have_ties_and_every_labeller() -> None:
    found = [(p["answer_a"], p["answer_b"], p["preference"], p["labeller"]) for p in pairs(ITEMS, JUDGEMENTS)]
    assert found == [
        ("a", "b", "b", "ann"), ("a", "c", "b", "ann"), ("b", "c", "tie", "ann"),
        ("a", "b", "b", "bob"), ("a", "c", "a", "bob"), ("b", "c", "a", "bob"),
    ]  # fmt: skip


def test_pairs_say_which_two_were_compared() -> None:
    """b before c and c before a: that b is before a only follows from it."""
    asked = Judgement("p0", "ann", (3, 1, 2), compared=("1>2", "2>0"))
    at_once = Judgement("p0", "bob", (3, 1, 2))
    found = [(p["answer_a"], p["answer_b"], p["preference"], p["compared"]) for p in pairs(ITEMS, [asked, at_once])]
    assert found == [
        ("a", "b", "b", False), ("a", "c", "b", True), ("b", "c", "a", True),
        ("a", "b", "b", True), ("a", "c", "b", True), ("b", "c", "a", True),
    ]  # fmt: skip


def test_the_files_hold_all_of_it(database: LabelDatabase, tmp_path: Path) -> None:
    for name in ("ann", "bob"):
        database.add_labeller(name)
    for key, judgement in enumerate(JUDGEMENTS):
        database.judge(judgement, str(key))
    counts = export(database, tmp_path / "out")
    assert counts == {
        "rankings.jsonl": 2,
        "pairs.jsonl": 6,
        "pairs.parquet": 6,
        "judgements.jsonl": 4,
        "judgements.parquet": 4,
    }
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(counts)
    rows = [json.loads(line) for line in (tmp_path / "out/judgements.jsonl").read_text(encoding="utf-8").splitlines()]
    assert pq.read_table(tmp_path / "out/judgements.parquet").to_pylist() == rows
    assert rows[0] == {
        "id": "p0", "prompt": "one?", "answers": ["a", "b", "c"], "labeller": "ann", "ranks": [3, 1, 1], "skipped": "",
        "flags": ["harmful:0"], "ratings": [None, 7, 6], "note": "é", "shown": [2, 0, 1], "seconds": 0.0, "at": 5.0,
        "repeat": 0, "compared": [],
    }  # fmt: skip
    loaded = load_dataset(
        "parquet", data_files=str(tmp_path / "out/pairs.parquet"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert [row["preference"] for row in loaded] == ["b", "b", "tie", "b", "a", "a"]


def test_rankings_come_in_once(database: LabelDatabase, tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"id": "p0", "ranking": [2, [0, 1]]}\n\n{"id": "p1", "ranking": null, "labeller": "ann"}\n')
    assert import_rankings(database, path, now=7.0) == 2 and import_rankings(database, path, now=8.0) == 0
    assert database.judgements() == [
        Judgement("p0", "imported", (2, 2, 1), at=7.0),
        Judgement("p1", "ann", None, skipped="imported without a ranking", at=7.0),
    ]
    # What is written out comes in again.
    export(database, tmp_path / "out")
    other = LabelDatabase(tmp_path / "other.sqlite")
    other.add_items(ITEMS)
    assert import_rankings(other, tmp_path / "out/rankings.jsonl", now=1.0) == 2
    assert rankings(ITEMS, other.judgements()) == rankings(ITEMS, database.judgements())


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ('{"id": "p9", "ranking": [0, 1]}', "line 1: id 'p9' is not among the items to rank"),
        ('{"id": ["p0"], "ranking": [0, 1]}', r"line 1: id \['p0'\] is not among the items to rank"),
        ('{"id": "p0"}', "line 1: ranking None must hold each of 0..2 once"),
        ('{"id": "p0", "ranking": [0, 1]}', r"line 1: ranking \[0, 1\] must hold each of 0..2 once"),
        (
            '{"id": "p1", "ranking": [0, 1]}\n{"id": "p1", "ranking": [1, 0]}',
            "line 2: id 'p1' was ranked before, in line 1",
        ),
        ('{"id": "p1", "ranking": [0, 1], "labeller": "a b"}', "line 1: labeller 'a b': a name has"),
        ("nonsense", "line 1"),
    ],
)
def test_a_line_that_does_not_fit_is_named_and_nothing_is_added(
    database: LabelDatabase, tmp_path: Path, lines: str, words: str
) -> None:
    (tmp_path / "mine.jsonl").write_text("\n".join(lines.split("\n")) + "\n")
    with pytest.raises(UserError, match=words):
        import_rankings(database, tmp_path / "mine.jsonl", now=1.0)
    assert database.judgements() == []


def test_gold_ranks_come_from_a_file(database: LabelDatabase, tmp_path: Path) -> None:
    (tmp_path / "gold.jsonl").write_text('{"id": "p0", "ranking": [2, [0, 1]]}\n')
    assert mark_gold(database, tmp_path / "gold.jsonl") == 1
    assert [item.gold for item in database.items()] == [(2, 2, 1), None, None]
    (tmp_path / "gold.jsonl").write_text('{"id": "p1", "ranking": null}\n')
    with pytest.raises(UserError, match="gold item 'p1' has no ranking"):
        mark_gold(database, tmp_path / "gold.jsonl")


# ---- prompts as dialogues

ASKED = [Turn("system", "Be brief."), Turn("user", "Hi\n\nthere"), Turn("assistant", "Hello."), Turn("user", "Why?")]


@pytest.mark.parametrize(
    "prompt",
    [
        "\n\nSystem: Be brief.\n\nHuman: Hi\n\nthere\n\nAssistant: Hello.\n\nHuman: Why?\n\nAssistant:",
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi\n\nthere<|im_end|>\n"
        "<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi\n\nthere<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        "Hello.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|system|>\nBe brief.</s>\n<|user|>\nHi\n\nthere</s>\n<|assistant|>\nHello.</s>\n<|user|>\nWhy?</s>\n"
        "<|assistant|>\n",
    ],
    ids=["plain", "chatml", "llama 3", "zephyr"],
)
def test_prompts_of_common_templates_are_split_into_turns(prompt: str) -> None:
    assert turns(prompt) == ASKED


def test_gemma_calls_the_assistant_model() -> None:
    prompt = "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nHello.<end_of_turn>\n"
    assert turns(prompt) == [Turn("user", "Hi"), Turn("assistant", "Hello.")]


@pytest.mark.parametrize(
    "prompt", ["POST: He said Human: no.\nTL;DR:", "<script>alert(1)</script>", " kept as it is \n"]
)
def test_another_prompt_is_one_text(prompt: str) -> None:
    assert turns(prompt) == [Turn("", prompt)]


def test_what_stands_before_the_first_turn_stays() -> None:
    assert turns("Rules first.\n\nHuman: Hi\n\nAssistant:") == [Turn("", "Rules first."), Turn("user", "Hi")]
