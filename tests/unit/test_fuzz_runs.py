"""Run folders of which a file is damaged: commands show what they can, or say in one line which file it is."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import strategies as st
from rich.console import Console
from starlette.testclient import TestClient

from jobs.answers import examples_of
from jobs.api import Run
from jobs.report import application
from jobs.status import show_rounds, show_runs, show_status
from jobs.tracking import Tracking
from rayrlhf.config_file import dump_config, parse_config
from rayrlhf.data.comparisons import RankedAnswers, read_ranked, write_comparisons
from rayrlhf.labelling.database import LabelDatabase
from rayrlhf.labelling.judgements import Item, Judgement
from rayrlhf.reports.card import Exported, model_card
from rayrlhf.reports.compare import markdown, read_runs
from rayrlhf.reports.page import write_report
from rayrlhf.reports.raters import agreement_of, labels_of
from rayrlhf.runs.folder import RunFolder, open_or_create
from rayrlhf.runs.metrics import MetricsWriter, read_metrics
from rayrlhf.runs.sharing import take_over
from tests.fuzz import CASES, changed_json, changed_table, damaged, said_of, try_cases


def whole_run(directory: Path) -> RunFolder:
    """A finished run with every file that a command reads, but for its models."""
    run = open_or_create(parse_config({"name": "one"}, "test"), directory)
    with MetricsWriter(run.path) as writer:
        for step in range(1, 5):
            writer.write("sft", step, {"sft/loss": 3.0 - step, "sft/steps": 4})
            writer.write("rl", step, {"rl/kl": float("nan") if step == 2 else 0.5 * step, "rl/reward/mean": 0.1 * step})
            writer.write("rl_eval", step, {"rl_eval/gold/mean": 0.1 * step, "rl_eval/best_step": 4})
        writer.write_text("rl", 4, "sample", {"prompt": "p", "answer": "a"})
        writer.write("run", 0, {"time/sft": 20.0})
        writer.warn("run", 1, ["few comparisons"])
    mean = {"mean": 0.5, "low": 0.25, "high": 0.75, "n": 4}
    of_source = {"gold": mean, "reward": mean, "length": mean, "kl": None}
    change = {"gold": {**mean, "p": 0.25}, "reward": {**mean, "p": 0.5}}
    evaluation = {
        "sft": of_source,
        "policy": {**of_source, "kl": mean, "gold_win_rate_vs_sft": mean, "win_rate_vs_sft": mean},
        "differences": {"policy_minus_sft": change, "policy_minus_sft_at_equal_length": {"gold": mean}},
        "metadata": {"prompts": 4, "data": "posts", "labeller": "reference"},
    }
    run.evaluation.write_text(json.dumps(evaluation))
    columns: dict[str, Any] = {"id": ["a", "b"], "post": ["why", "how"], "reference": ["r", None]}
    for number, source in enumerate(("sft", "policy")):
        columns[source] = [f"{source} 1", f"{source} 2"]
        columns |= {f"{measure}_{source}": [0.5, 1.0 + number] for measure in ("gold", "reward", "length", "eos_rate")}
    pq.write_table(pa.table(columns), run.samples, write_page_checksum=True)
    scorers = {"reward_model": mean, "longer": mean, "shorter": mean}
    minus = {"longer": mean, "shorter": mean}
    accuracy = {"pairs": 3, "prompts": 3, "accuracy": scorers, "reward_model_minus": minus}
    run.reward_accuracy.write_text(json.dumps(accuracy))
    pairs: dict[str, Any] = {"id": ["r0", "r1", "r2"], "prompt": [0, 1, 2], "better": [0, 0, 0], "worse": [1, 1, 1]}
    pairs |= {"source": [""] * 3, "reward_model": [0.5, -0.25, 2.0], "longer": [1.0, 0.0, -1.0]}
    pq.write_table(pa.table(pairs), run.heldout_pairs, write_page_checksum=True)
    records = [
        RankedAnswers(
            f"r{i}", f"prompt {i}", (i,), ("a b", "c d"), ((5, 6), (7,)), (2.0, 1.0), "people", gold=(1.0, 0.0)
        )
        for i in range(3)
    ]
    write_comparisons(run.comparisons, records)
    looks = [
        {"step": 2, "id": f"{i}", "prompt": "p", "answer": "a", "reference": "r", "gold": 0.5, "score": 1.0}
        for i in range(2)
    ]
    run.dev_samples.mkdir()
    for step in (2, 4):
        lines = [json.dumps({**look, "step": step}) + "\n" for look in looks]
        (run.dev_samples / f"step_{step:06d}.jsonl").write_text("".join(lines))
    run.tokens.write_text(json.dumps({"step": 1, "prompt": "p", "tokens": ["a", "b"], "logprobs": [-1.0, -2.0]}) + "\n")
    contents = {
        "data.demonstrations.path": {"path": "/a.csv", "files": {"a.csv": {"bytes": 1, "blake2b": "0", "stat": None}}}
    }
    run.contents.write_text(json.dumps(contents))
    other = {"from": str(directory / "other"), "stages": ["sft"], "own": [], "because": None}
    run.shared.write_text(json.dumps(other))
    (run.path / "tracking.json").write_text(json.dumps({"tensorboard": {"known": "x", "read": 0, "outcome": None}}))
    database = LabelDatabase(run.labels)
    database.add_items([Item(f"r{i}", f"prompt {i}", ("a b", "c d"), gold=(1, 2)) for i in range(3)])
    for name in ("ann", "bob"):
        database.add_labeller(name)
        for i in range(3):
            database.judge(Judgement(f"r{i}", name, (1, 2), flags=("harmful",), note="why"), f"key {name} {i}")
    database.close()
    return run


def look_at_labels(run: RunFolder) -> None:
    labels_of(run)
    database = LabelDatabase(run.labels)
    try:
        database.progress(), database.labellers(), database.identity, list(database.rows_after(0))
        database.add_labeller("eve")
        if database.item("r0"):
            database.judge(Judgement("r0", "eve", (2, 1)), "key of eve")
            database.undo("eve")
    finally:
        database.close()


def look_in_python(run: RunFolder) -> None:
    found = Run(run.address)
    found.metrics, found.evaluation, found.differences, found.samples, found.comparisons  # noqa: B018


def go_on(run: RunFolder) -> None:
    """What a stage reads before it continues a run."""
    config = parse_config({"name": run.name, "runs_dir": str(run.path.parent), "tracking": ["tensorboard"]}, "test")
    contents = {"data.demonstrations.path": {"path": "/a.csv", "files": {"a.csv": {"bytes": 1, "blake2b": "1"}}}}
    open_or_create(config, run.path.parent, ["sft", "evaluate", "collect", "reward_model"], contents)
    config = parse_config({**dump_config(config), "from": str(run.path.parent / "other")}, "test")
    with run.lock():
        take_over(run, config, {})
    Tracking(config, run)
    with MetricsWriter(run.path) as writer:
        writer.write("rl", 7, {"rl/kl": 1.0})
    assert read_metrics(run.path, "rl")[-1]["step"] == 7


def watch(run: RunFolder) -> None:
    with TestClient(application(run), base_url="http://127.0.0.1") as client:
        assert client.get("/state").status_code == 200
        assert client.get("/").status_code in (200, 503)


def screen() -> Console:
    return Console(file=io.StringIO(), width=100)


COMMANDS: dict[str, Callable[[RunFolder], Any]] = {
    "status": lambda run: show_status(run.path, None, screen()),
    "runs": lambda run: show_runs(run.path.parent, screen()),
    "rounds": lambda run: show_rounds(run.path.parent / "rounds", screen()),
    "report": write_report,
    "watch": watch,
    "compare": lambda run: markdown(read_runs([run.path, run.path.parent / "other"])),
    "agreement": lambda run: agreement_of([run.path]),
    "export": lambda run: model_card(run, Exported("policy", "one", None)),
    "python": look_in_python,
    "chat": examples_of,
    "label": look_at_labels,
    "reward-model": lambda run: read_ranked(run.comparisons),
    "resume": go_on,
}
CHANGES = {".json": changed_json, ".jsonl": changed_json, ".parquet": changed_table}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two finished runs, and one in rounds."""
    runs = tmp_path_factory.mktemp("whole")
    run = whole_run(runs)
    for name in ("other", "rounds/round-1"):
        shutil.copytree(run.path, runs / name)
    for file in ("config.yaml", "metrics.jsonl"):
        shutil.copy(run.path / file, runs / "rounds" / file)
    (runs / "rounds" / "rounds.json").write_text(json.dumps({"begun": 1, "stopped": None}))
    return runs


@CASES
@pytest.mark.parametrize("command", COMMANDS)
def test_a_damaged_file_is_shown_around_or_named(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, cases: int
) -> None:
    cases = max(cases // len(COMMANDS), 8)
    shutil.copytree(whole, tmp_path / "runs")
    run, rounds = RunFolder(tmp_path / "runs" / "one"), tmp_path / "runs" / "rounds"
    of = {"rounds": rounds}.get(command, run.path)
    files = {path: path.read_bytes() for path in sorted(of.rglob("*")) if path.is_file() and path.name != ".lock"}
    assert said_of(lambda: COMMANDS[command](run), capsys) is None

    @st.composite
    def harm(draw: Any) -> tuple[Path, bytes | None]:
        path = draw(st.sampled_from(sorted(files)))
        change = CHANGES.get(path.suffix, damaged) if draw(st.booleans()) else damaged
        return path, None if draw(st.integers(0, 9)) == 0 else change(files[path], draw)

    def check(case: tuple[Path, bytes | None]) -> None:
        path, content = case
        for each in sorted(of.rglob("*")):
            if each.is_file() and each not in files:
                each.unlink()
        for each, before in files.items():
            if not each.is_file() or each.read_bytes() != before:
                each.write_bytes(before)
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content)
        said_of(lambda: COMMANDS[command](run), capsys)

    try_cases(cases, check, harm())
