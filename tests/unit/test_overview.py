"""What `rayrlhf status` and `rayrlhf runs` say of run folders that are written by hand here."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console, RenderableType

from actors.pools.monitoring import Status
from jobs.live import Live, LiveActor, read_live
from jobs.status import cluster_address, runs_table, show_runs, show_status, status_screen
from rayrlhf.config_file import parse_config
from rayrlhf.errors import UserError
from rayrlhf.reports.overview import read_overview
from rayrlhf.runs.folder import RunFolder, open_or_create, run_folders
from rayrlhf.runs.metrics import MetricsWriter
from rayrlhf.runs.storage import Store
from tests.s3 import KEYS, serving

NOW = 10_000.0


def make_run(directory: str | Path, name: str = "one", **sections: object) -> RunFolder:
    """Five RL steps of twelve, 20 s apart but for a pause of 500 s; the last one 7 s ago."""
    run = open_or_create(parse_config({"name": name, "rl": {"steps": 12}, **sections}, "test"), directory)
    for stage in ("sft", "collect", "reward_model"):
        with run.writing(stage) as temporary:
            (temporary / "file" if temporary.is_dir() else temporary).write_text("")
    ends = [NOW - 7 - after for after in (560, 540, 520, 20, 0)]
    sft = [line("sft", 0, 9000, {"sft/steps": 4, "sft/dev_loss": 3.0}), line("sft", 4, 9060, {"sft/loss": 2.5})]
    run_lines = [line("run", 0, 9070, {"time/sft": 65.0})]
    rl = [line("rl", i + 1, t, {"rl/reward/mean": i / 10, "rl/kl": 10.0 * i}) for i, t in enumerate(ends)]
    rl[4] |= {"throughput/tokens_per_s": 1234.5, "idle/generator-0": 0.25}
    run.metrics.write_text("".join(json.dumps(each) + "\n" for each in (*sft, *run_lines, *rl)))
    run.upload(run.metrics)
    return run


def line(stage: str, step: int, time: float, values: Mapping[str, float]) -> dict[str, Any]:
    return {"stage": stage, "step": step, "time": time, **values}


def text(thing: RenderableType) -> str:
    console = Console(file=io.StringIO(), width=160)
    console.print(thing)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def rows(thing: RenderableType) -> list[list[str]]:
    """Cells of the table's rows, its heading left out."""
    return [[cell.strip() for cell in each.split("│")[1:-1]] for each in text(thing).splitlines() if "│" in each]


def test_a_run_without_rl_has_a_row_too(tmp_path: Path) -> None:
    run = make_run(tmp_path, stages=["sft", "collect", "dpo", "evaluate"])
    overview = read_overview(run.path)
    assert [stage.name for stage in overview.stages] == ["sft", "collect", "dpo", "evaluate"]
    assert overview.current and overview.current.name == "dpo"
    (row,) = rows(runs_table([run], NOW))
    assert row[:5] == ["one", "not running", "2 of 4", "dpo", "–"]


def test_how_far_a_run_is(tmp_path: Path) -> None:
    overview = read_overview(make_run(tmp_path).path)
    assert [(s.name, s.done, s.step, s.steps) for s in overview.stages] == [
        ("sft", True, 4, 4),
        ("collect", True, 0, None),
        ("reward_model", True, 0, None),
        ("rl", False, 5, 12),
        ("evaluate", False, 0, None),
    ]
    rl = overview.stage("rl")
    assert overview.current is rl and overview.newest is rl
    assert rl.seconds_a_step == 20 and rl.eta_s == 7 * 20  # the pause does not count
    assert overview.stage("sft").took_s == 65.0 and overview.stage("sft").eta_s is None
    assert overview.updated == NOW - 7
    assert overview.holder is None


def test_warnings_say_once_in_which_steps(tmp_path: Path) -> None:
    """KL is 10 a step: above the limit of 30 in the fifth step only; with a limit of 5 in all but the first."""
    path = make_run(tmp_path).path
    (warning,) = read_overview(path).warnings
    assert warning.startswith("rl step 5: the policy is 40.0 nats")
    strict = make_run(tmp_path, "strict", alarms={"max_kl": 5.0}).path
    (warning,) = read_overview(strict).warnings
    assert warning.startswith("rl steps 2 to 5: the policy is 10.0 nats")
    assert warning.endswith("(max_kl 5, 10 at first, 40 at last)")
    with MetricsWriter(strict) as writer:  # of a stage outside its steps, as `jobs.console.warn_of_stage` keeps it
        writer.warn("run", 2, ["the reward model is not clearly better"])
    assert read_overview(strict).warnings == ("reward_model: the reward model is not clearly better", warning)
    assert read_overview(strict, max_warnings=1).warnings == (warning,)


def test_a_run_with_given_comparisons_collects_none(tmp_path: Path) -> None:
    data = {"comparisons": {"format": "tldr_comparisons", "path": "file.jsonl"}}
    run = open_or_create(parse_config({"name": "given", "data": data}, "test"), tmp_path)
    assert [s.name for s in read_overview(run.path).stages] == ["sft", "reward_model", "rl", "evaluate"]


def test_the_holder_is_seen_from_another_process_while_it_holds(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    look = "import sys; from rayrlhf.runs.folder import RunFolder; print(RunFolder(sys.argv[1]).holder())"

    def seen() -> str:
        return subprocess.run(
            [sys.executable, "-c", look, str(run.path)], capture_output=True, text=True, check=True
        ).stdout.strip()

    assert seen() == "None"
    with run.lock():
        run.note_in_lock("Ray at 10.0.0.1:6379")
        said = seen()
    assert said.startswith(f"process {os.getpid()} on ") and said.endswith(", Ray at 10.0.0.1:6379")
    assert seen() == "None"


def test_where_the_cluster_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    holder = "process 5 on host, Ray at 10.0.0.1:6379"
    assert cluster_address(None, holder) == "10.0.0.1:6379"
    assert cluster_address(None, "process 5 on host") is None and cluster_address(None, None) is None
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.2:1")
    assert cluster_address(None, holder) == "10.0.0.2:1"
    assert cluster_address("10.0.0.3:1", holder) == "10.0.0.3:1"


def test_a_cluster_that_is_not_there_is_one_line_at_once(tmp_path: Path) -> None:
    config = read_overview(make_run(tmp_path).path).config
    with pytest.raises(UserError, match="no Ray cluster answers at 127.0.0.1:9"):
        read_live("127.0.0.1:9", config)
    with pytest.raises(UserError, match="no Ray cluster answers at nonsense"):
        read_live("nonsense", config)


def test_a_run_in_a_store_is_read_there_and_not_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a node with a cache of its own, while another one writes and afterwards."""

    def use_cache(name: str) -> None:
        monkeypatch.setenv("RAYRLHF_CACHE", str(tmp_path / name))
        Store.open.cache_clear()

    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    with serving() as s3:
        runs = s3.uri("store")
        use_cache("writer")
        run = make_run(runs)
        with run.lock():
            use_cache("reader")
            overview = read_overview(run.address)
            assert overview.holder == f"process {os.getpid()} on {socket.gethostname()}"
        later = read_overview(run.address)
        assert [(s.name, s.done) for s in overview.stages] == [(s.name, s.done) for s in later.stages]
        assert overview.stage("rl").step == 5 and overview.stage("reward_model").done and not overview.stage("rl").done
        assert later.holder is None
        assert not (tmp_path / "reader").exists()
        with pytest.raises(UserError, match="no run folder"):
            read_overview(s3.uri("store/other"))
        assert [folder.address for folder in run_folders(runs)] == [run.address]
        table = text(runs_table(run_folders(runs), NOW))
    assert not (tmp_path / "reader").exists()
    assert table == text(runs_table(run_folders(run.path.parent), NOW)) and "5/12" in table


def test_screen_of_a_run_that_was_interrupted(tmp_path: Path) -> None:
    screen = text(status_screen(read_overview(make_run(tmp_path).path), None, NOW))
    assert screen.splitlines()[0].split() == ["one", "not", "running"]
    cells = {row[0]: row[1:] for row in rows(status_screen(read_overview(tmp_path / "one"), None, NOW))}
    assert cells["sft"] == ["done", "4/4", "1 min 05 s"]
    assert cells["rl"] == ["interrupted", "5/12", "last step 7 s ago"]
    assert cells["evaluate"] == ["waiting", "", ""]
    assert "rl  5/12  reward 0.400  KL 40.000 nats  1,234 tok/s" in screen
    assert "warning: rl step 5" in screen


def test_screen_of_a_run_with_its_actors(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    status = Status(
        version=6,
        versions={"generator-0": 6, "generator-2": 5},
        groups={"waiting": 0, "generating": 3, "scoring": 2, "scored": 1},
        actors={"generator": 2, "scorer": 1},
        wanted={"generator": 3, "scorer": 1},
        replacements={"generator": 1, "scorer": 0},
    )
    actors = (
        LiveActor("coordinator", "ALIVE", "abc", 11),
        LiveActor("generator-0", "ALIVE", "abc", 12),
        LiveActor("generator-2", "PENDING_CREATION", "", 0),
    )
    with run.lock():
        shown = status_screen(read_overview(run.path), Live("10.0.0.1:6379", status, actors), NOW)
    assert text(shown).splitlines()[0].split() == ["one", "running"]
    cells = {row[0]: row[1:] for row in rows(shown)}
    assert cells["rl"] == ["running", "5/12", "ETA 2 min 20 s, last step 7 s ago"]
    assert cells["coordinator"] == ["alive", "", "", "abc", "11"]
    assert cells["generator-0"] == ["alive", "6", "25%", "abc", "12"]
    assert cells["generator-2"] == ["pending creation", "5", "", "", ""]
    assert "prompts: 0 waiting, 3 generating, 2 scoring, 1 scored" in text(shown)
    assert "2 of 3 generators (replaced so far: 1), 1 of 1 scorers (replaced so far: 0)" in text(shown)


def test_table_of_runs(tmp_path: Path) -> None:
    held = make_run(tmp_path, "b")
    open_or_create(parse_config({"name": "a"}, "test"), tmp_path)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "config.yaml").write_text("nonsense: 1\n")
    (tmp_path / "not a run").mkdir()
    folders = run_folders(tmp_path)
    assert [run.name for run in folders] == ["a", "b", "c"]
    with held.lock():
        table = runs_table(folders, NOW)
    assert rows(table) == [
        ["a", "not running", "0 of 5", "sft", "–", "–", "–"],
        ["b", "running", "3 of 5", "rl 5/12", "0.400", "40.000", "7 s ago"],
        ["c", "cannot be read: rayrlhf status says why", "–", "–", "–", "–", "–"],
    ]


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=160)
    with pytest.raises(UserError, match="no run folder"):
        show_status(tmp_path, None, console)
    with pytest.raises(UserError, match="no such directory"):
        show_runs(tmp_path / "nowhere", console)
    with pytest.raises(UserError, match="no such folder in the store"):
        show_runs(f"file://{tmp_path}/nowhere", console)
    show_runs(tmp_path, console)
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue() == f"no runs in {tmp_path}\n"
