"""A run in rounds goes on after a kill, keeps what is finished, ends by itself and stands for its newest round."""

from __future__ import annotations

import io
import json
import runpy
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from typer.testing import CliRunner

from jobs.cli import app
from jobs.rounds import run_rounds
from jobs.session import opened
from jobs.status import runs_table
from rayrlhf.config_file import load_config, parse_config
from rayrlhf.errors import UserError
from rayrlhf.reports import rounds as rounds_report
from rayrlhf.reports.compare import read_runs
from rayrlhf.reports.overview import read_overview
from rayrlhf.runs.folder import RunFolder, run_folders
from rayrlhf.runs.rounds import newest_round, round_config
from rayrlhf.runs.starts import find_model
from tests.rounds import EACH, Killed, config, stages_that

ROOT = Path(__file__).parents[2]


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports without their figure, which takes a second to draw."""
    monkeypatch.setattr(rounds_report, "rounds_figure", lambda results: None)


def test_a_killed_run_goes_on_in_its_round_and_does_nothing_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], undrawn: None
) -> None:
    own = config({"count": 2}, runs_dir=str(tmp_path))
    expected = [f"round-{n} {stage}" for n in (1, 2) for stage in EACH]
    log: list[str] = []
    for stage in expected[1:]:  # it is killed once before each stage
        with pytest.raises(Killed):
            run_rounds(own, stages_that(log, [0.7, 0.7], kill=stage))
    run = RunFolder(tmp_path / "mine")
    assert json.loads((run.path / "rounds.json").read_text()) == {"begun": 2, "stopped": None}
    run_rounds(own, stages_that(log, [0.7, 0.7]))
    assert log == expected
    run_rounds(own, stages_that(log, [0.7, 0.7]))
    assert log == expected, "finished rounds are not opened again"
    assert "2 of 2 done" in capsys.readouterr().out
    page = run.report.read_text()
    assert 'href="round-2/report.html"' in page and "0.700 [0.680, 0.720]" in page and "No further" not in page
    # One round more is one round more.
    run_rounds(config({"count": 3}, runs_dir=str(tmp_path)), stages_that(log, [0.7, 0.7, 0.7]))
    assert log[len(expected) :] == [f"round-3 {stage}" for stage in EACH]


def test_it_stops_by_itself_and_goes_on_when_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], undrawn: None
) -> None:
    log: list[str] = []
    rates = [0.7, 0.51, 0.51, 0.7]
    own = config({"count": 4}, runs_dir=str(tmp_path))
    for _ in range(2):
        run_rounds(own, stages_that(log, rates))
        out = " ".join(capsys.readouterr().out.split())
        assert len(log) == 3 * len(EACH)
        assert "no further round: in rounds 2 and 3 the interval of the win rate" in out and "3 of 4 done" in out
        shown = CliRunner().invoke(app, ["rounds", str(tmp_path / "mine")])
        assert shown.exit_code == 0 and "no further round: in rounds 2 and 3" in shown.output
        assert "No further round: in rounds 2 and 3" in (tmp_path / "mine/report.html").read_text()
    run_rounds(config({"count": 4, "stop": False}, runs_dir=str(tmp_path)), stages_that(log, rates))
    assert len(log) == 4 * len(EACH) and "no further round" not in capsys.readouterr().out


def test_a_finished_round_keeps_its_settings(tmp_path: Path, undrawn: None) -> None:
    log: list[str] = []
    with pytest.raises(Killed):
        run_rounds(config(runs_dir=str(tmp_path)), stages_that(log, [0.7] * 3, kill="round-3 rl"))
    for rounds, sections, said in (
        ({"age_weight": 0.5}, {}, "round-2/config.yaml: collect.earlier was"),
        ({}, {"rl": {"steps": 7}}, "round-1/config.yaml: rl.steps was 20 and is now 7"),
    ):
        with pytest.raises(UserError) as raised:
            run_rounds(config(rounds, runs_dir=str(tmp_path), **sections), stages_that(log, [0.7] * 3))
        assert said in str(raised.value) and "\n" not in str(raised.value)
    once = parse_config({"name": "mine", "runs_dir": str(tmp_path)}, "test")
    with pytest.raises(UserError, match="is a run in rounds; set rounds"), opened(once):
        pass


def test_a_run_in_rounds_stands_for_its_newest_round(tmp_path: Path, undrawn: None) -> None:
    log: list[str] = []
    with pytest.raises(Killed):
        run_rounds(config(runs_dir=str(tmp_path)), stages_that(log, [0.7] * 3, kill="round-2 evaluate"))
    run = RunFolder(tmp_path / "mine")
    assert newest_round(run).path == tmp_path / "mine/round-2"
    overview = read_overview(run.address)
    assert overview.name == "mine/round-2" and overview.current is not None and overview.current.name == "evaluate"
    console = Console(file=io.StringIO(), width=160)
    console.print(runs_table(run_folders(tmp_path), 0.0))
    assert isinstance(console.file, io.StringIO)
    assert [line.split()[1:8] for line in console.file.getvalue().splitlines() if "mine" in line] == [
        ["mine/round-2", "│", "not", "running", "│", "4", "of"]
    ]
    assert find_model(run.address, "rl", "rl.from") == str(tmp_path / "mine/round-2/policy")
    with pytest.raises(UserError, match=r"mine/round-2 is unfinished: it has no evaluation\.json"):
        read_runs([run.address])
    shown = CliRunner().invoke(app, ["rounds", str(tmp_path)])
    assert shown.exit_code == 2 and "no run in rounds" in shown.output + shown.stderr


def test_the_measurement_compares_equal_work(tmp_path: Path) -> None:
    script = runpy.run_path(str(ROOT / "scripts/rounds_against_once.py"))
    (file, *changes), (same, *others) = (script[plan](3, tmp_path) for plan in ("once", "in_rounds"))
    once, rounds = load_config(file, changes), load_config(same, others)
    assert once.rounds is None and rounds.rounds is not None and not rounds.rounds.stop
    assert once.rl.steps == rounds.rounds.count * rounds.rl.steps == 30
    assert once.collect.prompts == rounds.rounds.count * rounds.collect.prompts == 639
    assert once.seed == rounds.seed == 3 and rounds.start == str(tmp_path / "once-3")
    first = round_config(rounds, 1, str(tmp_path))
    assert (first.model, first.data, first.sft) == (once.model, once.data, once.sft), "SFT is taken over"
    # Ids in another order are brought together.
    for seed, (before, after) in enumerate([([0.1, 0.2, 0.3], [0.2, 0.3, 0.4]), ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])]):
        for name, ids, gold in (("once", "abc", before), ("rounds", "cba", after[::-1])):
            (tmp_path / f"{name}-{seed}").mkdir()
            table = pa.table({"id": list(ids), "gold_policy": gold})
            pq.write_table(table, tmp_path / f"{name}-{seed}" / "samples.parquet")
    lines = script["compare"](tmp_path, [0, 1])
    assert [line.split(" [")[0] for line in lines] == [
        "seed 0: +0.1000",
        "seed 1: +0.3000",
        "pooled over 2 seeds and their prompts: +0.2000",
        "over seeds (t): +0.2000",
    ]
