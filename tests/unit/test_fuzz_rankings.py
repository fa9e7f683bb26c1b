"""Files of rankings of any content: judgements, or one line that names the file and the line."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from rayrlhf.config_labellers import FileLabellerConfig
from rayrlhf.data.records import Prompt
from rayrlhf.labelling.database import LabelDatabase
from rayrlhf.labelling.exports import import_rankings, mark_gold
from rayrlhf.labelling.judgements import Item
from rayrlhf.rewards.labellers import FileLabeller, Unranked, read_unranked, write_unranked
from rayrlhf.runs.folder import RunFolder
from tests.fuzz import CASES, ODD, changed_json, damaged, said_of, try_cases

ITEMS = [Item(f"p{i}", f"prompt {i}", ("first", "second", "third")) for i in range(3)]

index = st.integers(-1, 3) | st.sampled_from(ODD)
ranking = st.one_of(
    st.permutations([0, 1, 2]),
    st.sampled_from([None, [[0, 1, 2]], [2, [0, 1]], [[], [0], [1], [2]]]),
    st.lists(index | st.lists(index, max_size=3), max_size=4),
    st.sampled_from(ODD),
)
line = st.fixed_dictionaries(
    {"id": st.sampled_from(["p0", "p1", "p2"]) | st.sampled_from(ODD), "ranking": ranking},
    optional={
        "labeller": st.sampled_from(["ann", "bob", "\ud83d", "../x", "", "x" * 50, "<b>"]) | st.sampled_from(ODD)
    },
)
ODD_LINES = ("", "[]", "{", "[" * 5000, '{"id": ' + "1" * 5000 + "}", '{"id": "p0"}')


@st.composite
def files(draw: Any) -> bytes:
    lines = [json.dumps(each) for each in draw(st.lists(line, max_size=4))]
    lines += draw(st.lists(st.sampled_from(ODD_LINES), max_size=1))
    content = "\n".join(draw(st.permutations(lines))).encode()
    return damaged(content, draw) if draw(st.integers(0, 3)) == 0 else content


@CASES
def test_any_rankings_are_taken_or_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], cases: int
) -> None:
    database = LabelDatabase(tmp_path / "labels.sqlite")
    database.add_items(ITEMS)
    run, prompts = RunFolder(tmp_path / "run"), [(Prompt(item.id, item.prompt), item.answers) for item in ITEMS]
    numbers = itertools.count()

    def label(path: Path) -> None:
        labeller = FileLabeller(FileLabellerConfig(kind="file", path=str(path)))
        labeller.prepare(prompts, run)
        for prompt, answers in prompts:
            assert sorted(labeller.rank(prompt, answers).order) == [0, 1, 2]

    readers = {
        "import": lambda path: import_rankings(database, path, 0.0),
        "gold": lambda path: mark_gold(database, path),
        "labeller": label,
    }

    def check(case: tuple[bytes, str]) -> None:
        path = tmp_path / f"{next(numbers)}.jsonl"
        path.write_bytes(case[0])
        said = said_of(lambda: readers[case[1]](path), capsys)
        path.unlink()
        assert said is None or path.name in said

    try_cases(cases, check, st.tuples(files(), st.sampled_from(sorted(readers))))


@CASES
def test_answers_that_wait_for_rankings_are_read_back_or_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], cases: int
) -> None:
    path = tmp_path / "to_rank.jsonl"
    write_unranked(path, [Unranked(f"p{i}", "prompt", ("a", "b"), (1, 2), ((3,), (4, 5))) for i in range(3)])
    whole = path.read_bytes()

    @st.composite
    def contents(draw: Any) -> bytes:
        return damaged(whole, draw) if draw(st.booleans()) else changed_json(whole, draw)

    def check(content: bytes) -> None:
        path.write_bytes(content)
        said = said_of(lambda: read_unranked(path), capsys)
        assert said is None or path.name in said

    try_cases(cases, check, contents())
