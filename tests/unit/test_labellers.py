"""Labellers: the stand-in by ROUGE-L (that by content words has its own file), and people's rankings from a file."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from rayrlhf.config_file import parse_config
from rayrlhf.config_labellers import FileLabellerConfig, LabellerConfig
from rayrlhf.data.records import Prompt
from rayrlhf.errors import UserError
from rayrlhf.rewards.labellers import (
    FileLabeller,
    Unranked,
    check_labeller,
    make_labeller,
    read_unranked,
    write_unranked,
)
from rayrlhf.runs.folder import RunFolder


def section(**settings: Any) -> LabellerConfig:
    """`collect.labeller` of a config."""
    return parse_config({"name": "run", "collect": {"labeller": settings}}, "test").collect.labeller


PROMPT = Prompt("a", "What?\n\nTL;DR:", "the cat sat on the mat", metadata={"most": 3})


def rouge_l(reference: str, answer: str) -> float:
    """Oracle without a stemmer: F1 of the longest common subsequence of words."""
    x, y = reference.split(), answer.split()
    table = [[0] * (len(y) + 1) for _ in range(len(x) + 1)]
    for i, a in enumerate(x):
        for j, b in enumerate(y):
            table[i + 1][j + 1] = table[i][j] + 1 if a == b else max(table[i][j + 1], table[i + 1][j])
    common = table[-1][-1]
    return 2 * common / (len(x) + len(y))


def test_reference_labeller_ranks_by_rouge_l() -> None:
    labeller = make_labeller(section(kind="reference", measure="rouge_l"))
    answers = ["a dog ran", "mat the on cat", "the cat lay on the mat", "the cat sat on the mat"]
    verdict = labeller.rank(PROMPT, answers)
    assert verdict.scores == pytest.approx([rouge_l(PROMPT.reference or "", a) for a in answers])
    assert verdict.order == (3, 2, 1, 0)
    assert labeller.measure(PROMPT, answers[2]) == pytest.approx(5 / 6)


def test_a_function_of_ones_own_ranks_and_measures(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "def words(responses, metadata, least):\n"
        "    return [max(least, min(len(r.split()), m['most'])) for r, m in zip(responses, metadata)]\n"
    )
    config = section(kind="python", path=f"{file}:words", settings={"least": 1})
    check_labeller(config)
    labeller = pickle.loads(pickle.dumps(make_labeller(config)))
    file.unlink()  # the scorers' nodes have none, and measure by it
    verdict = labeller.rank(PROMPT, ["one two", "one two three four", "one", "one two three"])
    assert verdict.scores == (2.0, 3.0, 1.0, 3.0) and verdict.order == (1, 3, 0, 2)
    assert labeller.measure(PROMPT, "one two") == 2.0


@pytest.mark.parametrize(
    ("code", "path", "said"),
    [
        ("", "mine.py", "key 'collect.labeller.path'"),
        ("def other(): pass", "mine.py:score", "has no 'score'"),
        (
            "def score(token_ids): pass",
            "mine.py:score",
            "labeller 'python' (",
        ),
        ("def score(responses):\n    return [1 / 0]", "mine.py:score", "raised ZeroDivisionError"),
    ],
)
def test_what_a_function_does_wrong_is_one_line(tmp_path: Path, code: str, path: str, said: str) -> None:
    (tmp_path / "mine.py").write_text(code)
    with pytest.raises(UserError) as raised:
        config = section(kind="python", path=f"{tmp_path}/{path}")
        make_labeller(config).rank(PROMPT, ["one two"])
    assert said in str(raised.value) and "\n" not in str(raised.value)


def test_reference_labeller_stems_and_keeps_ties_in_order() -> None:
    labeller = make_labeller(section(measure="rouge_l"))
    verdict = labeller.rank(Prompt("a", "p", "cats running"), ["no", "cat runs", "cat run", "no"])
    assert verdict.scores == (0.0, 1.0, 1.0, 0.0) and verdict.order == (1, 2, 0, 3)


def test_reference_labeller_needs_a_reference() -> None:
    with pytest.raises(UserError, match="prompt 'b' has no reference"):
        make_labeller(section()).rank(Prompt("b", "p"), ["x", "y"])


def test_unknown_kind_and_missing_path() -> None:
    with pytest.raises(UserError, match="key 'collect.labeller.kind': 'oracle' is none of reference, file"):
        section(kind="oracle")
    with pytest.raises(UserError, match="key 'collect.labeller.path' is missing"):
        section(kind="file")
    with pytest.raises(UserError, match="unknown key 'collect.labeller.path'; known keys: kind, measure"):
        section(path="rankings.jsonl")


def test_people_rank_what_was_written_for_them(tmp_path: Path) -> None:
    config = FileLabellerConfig(path=str(tmp_path / "rankings.jsonl"))
    to_rank = tmp_path / "to_rank.jsonl"
    waiting = [
        Unranked("a", "What?\n\nTL;DR:", ("hot tea", "cold téa\n", "no tea"), (2, 7), ((1, 2), (3,), (4, 2))),
        Unranked("b", "Why?\n\nTL;DR:", ("yes", "no"), (2, 8), ((5,), (6, 2))),
    ]
    write_unranked(to_rank, waiting)
    labeller, run = make_labeller(config), RunFolder(tmp_path)
    prompts = [(Prompt(item.id, item.prompt), item.answers) for item in waiting]
    with pytest.raises(UserError) as error:
        labeller.prepare(prompts, run)
    assert "2 prompts with answers to rank were written to" in str(error.value) and "\n" not in str(error.value)
    assert str(to_rank) in str(error.value) and str(config.path) in str(error.value)
    assert read_unranked(to_rank) == waiting
    assert [p.name for p in tmp_path.iterdir()] == ["to_rank.jsonl"]

    (tmp_path / "rankings.jsonl").write_text('{"id": "b", "ranking": [1, 0]}\n\n{"id": "a", "ranking": [2, 0, 1]}\n')
    assert isinstance(labeller, FileLabeller)
    labeller.prepare(prompts, run)
    verdict = labeller.rank(Prompt("a", waiting[0].prompt), waiting[0].answers)
    assert verdict.order == (2, 0, 1) and verdict.scores is None
    assert labeller.measure(PROMPT, "hot tea") is None


def people(path: Path, *prompts: tuple[str, int]) -> FileLabeller:
    """Ranks prompts that have so many answers."""
    labeller = FileLabeller(FileLabellerConfig(path=str(path)))
    labeller.prepare([(Prompt(id, "?"), ["x"] * count) for id, count in prompts], RunFolder(path.parent))
    return labeller


def test_people_may_call_answers_equal_or_say_nothing(tmp_path: Path) -> None:
    """As `rayrlhf label RUN --export` writes it."""
    path = tmp_path / "rankings.jsonl"
    path.write_text('{"id": "a", "ranking": [2, [3, 0], 1]}\n{"id": "b", "ranking": null}\n')
    labeller = people(path, ("a", 4), ("b", 2))
    tied = labeller.rank(Prompt("a", "?"), "wxyz")
    assert tied.order == (2, 0, 3, 1) and tied.scores is not None and not tied.unknown
    assert tied.scores[2] > tied.scores[3] == tied.scores[0] > tied.scores[1]
    assert labeller.rank(Prompt("b", "?"), "xy").unknown


GOOD = {"id": "a", "ranking": [0, 1]}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([GOOD, {"id": "c", "ranking": [0, 1]}], r"rankings.jsonl line 2: id 'c' is not among the prompts"),
        ([GOOD], r"1 of 2 prompts have no ranking, first 'b'"),
        ([GOOD, {"id": "b", "ranking": [0, 0, 1]}], r"line 2: ranking \[0, 0, 1\] of 'b' must hold each of 0..2 once"),
        ([GOOD, {"id": "b", "ranking": [1, 2, 3]}], r"line 2: ranking \[1, 2, 3\]"),
        ([GOOD, {"id": "b", "ranking": [0, 1]}], r"line 2: ranking \[0, 1\]"),
        ([GOOD, {"id": "b", "ranking": "012"}], r"line 2: ranking '012'"),
        ([GOOD, {"id": "b", "ranking": [0, True, 2]}], r"line 2: ranking \[0, True, 2\]"),
        ([GOOD, GOOD], r"line 2: id 'a' was ranked before, in line 1"),
        ([GOOD, {"id": "b"}], r'line 2: expected {"id"'),
        ([GOOD, ["b"]], r"line 2: expected an object, found list"),
    ],
)
def test_mistakes_name_file_and_line(tmp_path: Path, lines: list[object], message: str) -> None:
    path = tmp_path / "rankings.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(UserError, match=message) as error:
        people(path, ("a", 2), ("b", 3))
    assert "\n" not in str(error.value) and "rankings.jsonl" in str(error.value)


def test_files_that_are_missing_or_not_json(tmp_path: Path) -> None:
    path = tmp_path / "rankings.jsonl"
    path.write_text('{"id": "a", "ranking": [0, 1]}\n{"id"')
    with pytest.raises(UserError, match="rankings.jsonl line 2: not valid JSON"):
        people(path)
    with pytest.raises(UserError, match="none.jsonl: no such file"):
        read_unranked(tmp_path / "none.jsonl")
    path.write_text('{"id": "a"}')
    with pytest.raises(UserError, match="rankings.jsonl line 1: not as collect wrote it"):
        read_unranked(path)
