"""Files of a run folder that were changed since they were written: named with what to do, or left out with a word."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.report import write
from rayrlhf.config_file import parse_config
from rayrlhf.errors import UserError
from rayrlhf.labelling.database import LabelDatabase
from rayrlhf.labelling.judgements import Item
from rayrlhf.reports.page import write_report
from rayrlhf.reports.results import read_accuracy, read_evaluation
from rayrlhf.runs.folder import RunFolder, open_or_create, stored_contents
from rayrlhf.runs.metrics import MetricsWriter
from rayrlhf.runs.reading import read_json, read_json_lines, read_table
from rayrlhf.runs.rounds import RECORD, rounds_of
from rayrlhf.runs.sharing import take_over

MEAN = {"mean": 0.5, "low": 0.25, "high": 0.75, "n": 4}


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return open_or_create(parse_config({"name": "one", "runs_dir": str(tmp_path)}, "test"), tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "Expecting value"),
        (b'{"a": ', "Expecting value"),
        (b'{"a": "\xe9"}', "codec can't decode"),
        (b"[1, 2]", "it: Input should be"),
        (b'{"a": "1"}', "a: Input should be a valid integer"),
        (b'{"a": NaN}', "NaN is no number of JSON"),
        (b'{"a": ' + b"[" * 5000, "recursion"),
        (b'{"a": ' + b"7" * 5000 + b"}", "Exceeds the limit"),
    ],
)
def test_json_of_another_shape_is_one_line(content: bytes, words: str) -> None:
    with pytest.raises(UserError, match=f"^/runs/one/x.json: is damaged .*{words}.*; copy it back") as error:
        read_json(content, "/runs/one/x.json", dict[str, int])
    assert len(str(error.value)) <= 300 and "\n" not in str(error.value)


def test_lines_and_values_are_what_they_were() -> None:
    assert read_json(b'{"a": 1}', "x", dict[str, int]) == {"a": 1}
    assert read_json_lines(b'{"a": 1}\n\n{"b": 2}\n', "x", dict[str, int]) == [{"a": 1}, {"b": 2}]


def test_a_table_with_a_flipped_bit_or_without_a_column_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "samples.parquet"
    pq.write_table(pa.table({"id": ["a", "b"], "post": ["why", "how"]}), path, write_page_checksum=True)
    whole = path.read_bytes()
    assert read_table(whole, str(path), "id", "post").column("post").to_pylist() == ["why", "how"]
    flipped = whole.replace(b"why", b"wiy", 1)
    assert flipped != whole
    for content, columns in ((flipped, ()), (whole[:-9], ()), (whole, ("reference",)), (b"PAR1", ())):
        with pytest.raises(UserError, match=r"samples.parquet: is damaged .*; delete evaluation.json, and the stage"):
            read_table(content, str(path), *columns)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"policy": {"gold": {"mean": 1.0}}}, "policy.gold.low"),
        ({"policy": {"gold": {**MEAN, "mean": "0.5"}}}, "policy.gold.mean"),
        ({"differences": [1]}, "differences"),
        ({"sft": 3}, "sft"),
    ],
)
def test_an_evaluation_of_another_shape(run: RunFolder, change: dict[str, Any], words: str) -> None:
    assert read_evaluation(run) is None and read_accuracy(run) is None
    whole = {"policy": {"gold": MEAN, "kl": None}, "sft": {}, "differences": {}, "metadata": {"prompts": 4}}
    run.evaluation.write_text(json.dumps(whole))
    assert read_evaluation(run) == whole
    run.evaluation.write_text(json.dumps(whole | change))
    with pytest.raises(UserError, match=rf"evaluation.json: is damaged \({words}: .*delete evaluation.json"):
        read_evaluation(run)


def test_a_run_does_not_go_on_with_what_it_cannot_read(run: RunFolder, tmp_path: Path) -> None:
    """These files say what went into finished stages: to take them for empty would train on other data in silence."""
    run.contents.write_text('{"data.demonstrations.path": {"path": 3}}')
    with pytest.raises(UserError, match=r"contents.json: is damaged .*; delete it"):
        stored_contents(run)
    other = open_or_create(parse_config({"name": "two", "runs_dir": str(tmp_path)}, "test"), tmp_path)
    run.shared.write_text('{"stages": []}')
    config = parse_config({"name": "one", "runs_dir": str(tmp_path), "from": str(other.path)}, "test")
    with pytest.raises(UserError, match=r"shared.json: is damaged \('from' is missing\); delete it"):
        take_over(run, config, {})
    (run.path / RECORD).write_text('{"begun": -1}')
    with pytest.raises(UserError, match=r"rounds.json: is damaged .*; write \{\"begun\": N\}"):
        rounds_of(run)


def test_the_report_goes_without_what_is_damaged(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    with MetricsWriter(run.path) as writer:
        for step in (1, 2):
            writer.write("rl", step, {"rl/kl": 1.0 * step, "rl/reward/mean": 0.1})
    whole = write_report(run).read_text()
    assert "Not on this page" not in whole
    run.evaluation.write_text("{}")
    write(str(run.path))
    page = run.report.read_text()
    assert "Not on this page" in page and "evaluation.json: is damaged" in page
    assert 'id="rl"' in whole and 'id="rl"' in page  # the curves are there
    assert "report: " in capsys.readouterr().out


def test_a_damaged_database_is_named(tmp_path: Path) -> None:
    path = tmp_path / "labels.sqlite"
    database = LabelDatabase(path)
    database.add_items([Item(f"p{i}", "x" * 3000, ("a", "b")) for i in range(20)])
    database.remember("key", 1)
    database.close()
    whole = path.read_bytes()
    page = int.from_bytes(whole[16:18], "big")
    path.write_bytes(whole[: 2 * page] + bytes(len(whole) - 2 * page))  # zeros, as after a power cut
    with pytest.raises(UserError, match=r"labels\.sqlite: (the labels )?cannot be (read|used|written)"):
        found = LabelDatabase(path)
        found.items(), found.recall("key"), found.labellers()
