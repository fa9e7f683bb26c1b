"""Ranked answers: pairs, dropping, the Parquet file. Labelled answers: those to one prompt together."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rayrlhf.config_data import DatasetConfig
from rayrlhf.data.comparisons import (
    RankedAnswers,
    from_comparisons,
    of_run,
    rank_answers,
    read_ranked,
    usable_answers,
    write_comparisons,
)
from rayrlhf.data.labelled import group_answers
from rayrlhf.data.records import Comparison, LabelledAnswer
from rayrlhf.data.sources import DataSet, Rendering
from rayrlhf.data.tokens import encode_prompt, encode_response
from rayrlhf.errors import UserError

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(Path(__file__).parents[2] / "rayrlhf/assets/opt-tiny")


def ranked(scores: tuple[float, ...] | None, ids: list[list[int]], order: list[int]) -> RankedAnswers:
    return rank_answers(
        id="a",
        prompt="What?",
        prompt_ids=[2, 5],
        responses=[f"answer {i}" for i in range(len(ids))],
        response_ids=ids,
        order=order,
        scores=scores,
        labeller="reference",
        heldout=True,
    )


def test_answers_are_sorted_best_first() -> None:
    record = ranked((0.1, 0.9, 0.5), [[1], [2], [3, 4]], [1, 2, 0])
    assert record.responses == ("answer 1", "answer 2", "answer 0")
    assert record.response_ids == ((2,), (3, 4), (1,))
    assert record.scores == (0.9, 0.5, 0.1)
    assert record.pairs == ((0, 1), (0, 2), (1, 2))


def test_ties_and_equal_tokens_are_no_pairs() -> None:
    assert ranked((0.5, 0.9, 0.5), [[1], [2], [3]], [1, 0, 2]).pairs == ((0, 1), (0, 2))
    assert ranked((0.5, 0.5), [[1], [2]], [0, 1]).pairs == ()
    assert ranked(None, [[1], [2], [1]], [0, 1, 2]).pairs == ((0, 1), (1, 2))


def test_order_must_be_a_permutation() -> None:
    with pytest.raises(ValueError, match=r"\[0, 0\] is not a ranking of 2 answers"):
        ranked(None, [[1], [2]], [0, 0])


def test_useless_answers_are_dropped_and_counted() -> None:
    kept, dropped = usable_answers(["one two three four", "a b c d e", " a b c d e ", "", "f g h i j"])
    assert kept == [1, 4] and dropped == {"nearly_empty": 2, "identical": 1}


def test_answers_in_a_script_without_spaces_are_kept(tokenizer: PreTrainedTokenizerBase) -> None:
    source = DatasetConfig(format="prompts", path=str(DATA / "chinese_pairs.jsonl"))
    pairs = DataSet([source], Rendering(tokenizer, 400), "comparison")
    found = [pairs.comparisons(split) for split in ("train", "valid")]
    assert sum(len(each.records) for each in found) == 4
    assert all(each.dropped == {} for each in found)
    short = ["很好。", "ดี", "因为天气变冷了", "因为天气变冷了"]
    assert usable_answers(short) == ([2], {"nearly_empty": 2, "identical": 1})


def encoded(tokenizer: PreTrainedTokenizerBase, record: Any) -> Any:
    """The record with the token ids of its texts, whole, as it is read."""
    response_ids = (tuple(encode_response(tokenizer, answer, 10**6, record.text)) for answer in record.answers)
    return replace(record, ids=tuple(encode_prompt(tokenizer, record.text)), response_ids=tuple(response_ids))


def test_published_comparisons(tokenizer: PreTrainedTokenizerBase) -> None:
    same = "the first ten words of these two answers are equal "
    comparisons = [
        Comparison("a", "What?\n\nTL;DR:", ("good tea is hot tea", "bad tea is cold", "no"), "us"),
        Comparison("b", "Why?\n\nTL;DR:", (same + "yes", same + "no")),
    ]
    comparisons = [encoded(tokenizer, each) for each in comparisons]
    records = from_comparisons(comparisons, 8, heldout=True)
    assert [r.id for r in records] == ["a"]  # cut to 8 tokens, the answers of b are the same
    record = records[0]
    assert record.pairs == ((0, 1), (0, 2), (1, 2)) and record.scores is None
    assert (record.labeller, record.source, record.heldout) == ("people", "us", True)
    assert list(record.prompt_ids) == encode_prompt(tokenizer, "What?\n\nTL;DR:")
    assert [list(ids) for ids in record.response_ids] == [
        encode_response(tokenizer, text, 8, "TL;DR:") for text in comparisons[0].responses
    ]
    assert len(from_comparisons(comparisons, 48)) == 2


def test_labelled_answers_to_one_prompt_are_together(tokenizer: PreTrainedTokenizerBase) -> None:
    same = "the first ten words of these two answers are equal "
    rows = [
        LabelledAnswer("a", "What?", "tea", True),
        LabelledAnswer("b", "Why?", same + "yes", True),
        LabelledAnswer("c", "What?", "milk", False),
        LabelledAnswer("d", "Why?", same + "no", False),
        LabelledAnswer("e", "What?", "tea", True, "elsewhere"),
        LabelledAnswer("f", "What?", "water", True),
        LabelledAnswer("g", "Who?", same + "yes", True),
        LabelledAnswer("h", "Who?", same + "no", True),
    ]
    rows = [encoded(tokenizer, each) for each in rows]
    records, dropped = group_answers(rows, 8, heldout=True)
    assert dropped == {"good_and_bad": 2}  # cut to 8 tokens, b and d are the same answer with both labels
    assert [(r.id, r.labels, r.source) for r in records] == [
        ("a", (True, False, True), ""),
        ("e", (True,), "elsewhere"),
        ("g", (True, True), ""),
    ]
    assert list(records[0].prompt_ids) == encode_prompt(tokenizer, "What?") and records[0].heldout
    assert [list(ids) for ids in records[0].response_ids] == [
        encode_response(tokenizer, text, 8, "What?") for text in ("tea", "milk", "water")
    ]
    assert (records[0].examples, records[0].counts) == (3, {"good answers": 2, "bad answers": 1})
    records, dropped = group_answers(rows, 48)
    assert [len(r.labels) for r in records] == [3, 2, 1, 2] and not dropped and not records[0].heldout


def test_parquet_round_trip(tmp_path: Path) -> None:
    records = [ranked((0.1, 0.9), [[1, 2], [2]], [1, 0]), ranked(None, [[1], [2], [3]], [2, 0, 1])]
    path = tmp_path / "comparisons.parquet"
    write_comparisons(path, records)
    assert read_ranked(path) == records
    write_comparisons(path, records[:1])
    assert read_ranked(path) == records[:1]
    assert [p.name for p in tmp_path.iterdir()] == ["comparisons.parquet"]


def test_comparisons_of_an_earlier_run() -> None:
    """Held-out ones keep their weight and stay, whatever becomes of the others."""
    heldout = ranked(None, [[1], [2]], [0, 1])
    learnt = replace(heldout, heldout=False)
    named = replace(learnt, source="people")
    found = of_run([heldout, learnt, named], "round-1", 0.5)
    assert [(c.source, c.weight, c.examples) for c in found] == [
        ("round-1", 1.0, 1.0), ("round-1", 0.5, 0.5), ("people", 0.5, 0.5),
    ]  # fmt: skip
    assert of_run([heldout, learnt], "round-1", 0.0) == [replace(heldout, source="round-1")]
    assert of_run([learnt], "round-2") == [replace(learnt, source="round-2")]


def test_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "comparisons.parquet"
    records = [ranked(None, [[1], [2]], [0, 1])]
    write_comparisons(path, records)
    bad = RankedAnswers("b", "p", (2,), ("x", "y"), (("no id",), (2,)), None, "people")  # type: ignore[arg-type]
    with pytest.raises((pa.ArrowException, TypeError)):
        write_comparisons(path, [bad])
    assert read_ranked(path) == records
    assert [p.name for p in tmp_path.iterdir()] == ["comparisons.parquet"]


def test_file_of_others_is_sorted_by_its_ranking(tmp_path: Path) -> None:
    path = tmp_path / "comparisons.parquet"
    write_comparisons(path, [ranked((3.0, 2.0, 1.0), [[1], [2], [3]], [0, 1, 2])])
    row = pq.read_table(path).to_pylist()[0]
    pq.write_table(pa.Table.from_pylist([row | {"ranking": [2, 0, 1], "scores": None}]), path)
    assert read_ranked(path)[0].response_ids == ((3,), (1,), (2,))
    pq.write_table(pa.Table.from_pylist([row | {"ranking": [2, 0, 0]}]), path)
    with pytest.raises(UserError, match=r"comparisons.parquet row 1: \[2, 0, 0\] is not a ranking of 3 answers"):
        read_ranked(path)
    pq.write_table(pa.Table.from_pylist([row | {"scores": [1.0]}]), path)
    with pytest.raises(UserError, match="row 1: responses, response_ids and scores differ in length"):
        read_ranked(path)


def test_missing_or_foreign_file(tmp_path: Path) -> None:
    path = tmp_path / "comparisons.parquet"
    with pytest.raises(UserError, match="no such file; the collect stage writes it"):
        read_ranked(path)
    path.write_bytes(b"PAR1")
    with pytest.raises(UserError, match="cannot be read"):
        read_ranked(path)
    pq.write_table(pa.table({"id": ["a"]}), path)
    with pytest.raises(UserError, match="no column 'prompt'; there are: id"):
        read_ranked(path)
