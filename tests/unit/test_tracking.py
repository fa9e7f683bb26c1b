"""Trackers get every line of metrics.jsonl once, go on with their run after an interruption, and never end one."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import jobs.tracking
from jobs.tracking import Tracking
from rayrlhf.config import Config
from rayrlhf.config_file import parse_config
from rayrlhf.errors import UserError
from rayrlhf.runs.changes import config_changes
from rayrlhf.runs.folder import RunFolder
from rayrlhf.runs.metrics import MetricsWriter
from rayrlhf.tracking.base import Outcome, Tracked
from rayrlhf.tracking.registry import TRACKERS, check_trackers, make_tracker

ROOT = Path(__file__).parents[2]


class Recorder:
    """A tracker that keeps what it is given, and fails when it is told to."""

    def __init__(self) -> None:
        self.opened: list[str | None] = []
        self.lines: list[tuple[str, int]] = []
        self.outcomes: list[Outcome] = []
        self.fails_at: tuple[str, int] | None = None
        self.second = threading.Event()
        """Set when a line of step 2 has come."""

    def open(self, run: Tracked, known: str | None) -> str | None:
        self.opened.append(known)
        assert run.config["name"] == run.name == "one"
        return "its-name"

    def write(self, line: Mapping[str, Any]) -> None:
        at = (line["stage"], line["step"])
        if at == self.fails_at:
            raise ConnectionError("no\nroute")
        self.lines.append(at)
        if line["step"] == 2:
            self.second.set()

    def finish(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)

    def close(self) -> None:
        self.opened.append("closed")


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """The one tracker of all sessions."""
    found = Recorder()
    monkeypatch.setattr(jobs.tracking, "make_tracker", lambda name: found)
    return found


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "one")


def config(run: RunFolder, *tracking: str) -> Config:
    return parse_config({"name": "one", "runs_dir": str(run.path.parent), "tracking": list(tracking)}, "test")


def steps(run: RunFolder, stage: str, *numbers: int) -> None:
    with MetricsWriter(run.path) as writer:
        for step in numbers:
            writer.write(stage, step, {f"{stage}/loss": float(step), "time/step": 1.0})


def session(run: RunFolder, *tracking: str) -> None:
    """One that ends at once: what is there by then has been handed over."""
    tracked = Tracking(config(run, *tracking), run)
    tracked.start()
    tracked.close()


def evaluated(run: RunFolder) -> None:
    gold = {"mean": 0.25, "low": 0.0, "high": 0.5, "n": 1}
    found = {"sft": {"gold": gold, "kl": None}, "metadata": {"prompts": 1}}
    run.evaluation.write_text(json.dumps(found))
    pq.write_table(pa.table({"post": ["p"], "sft": ["a"], "gold_sft": [0.25]}), run.samples)
    run.report.write_text("<html>")


def test_each_line_is_handed_over_once_in_all_sessions(run: RunFolder, recorder: Recorder) -> None:
    steps(run, "sft", 1, 2)
    session(run, "tensorboard")
    steps(run, "sft", 3)
    steps(run, "rl", 1)
    session(run, "tensorboard")
    assert recorder.lines == [("sft", 1), ("sft", 2), ("sft", 3), ("rl", 1)]
    assert recorder.opened == [None, "closed", "its-name", "closed"]
    assert json.loads((run.path / "tracking.json").read_text())["tensorboard"] == {
        "known": "its-name", "read": run.metrics.stat().st_size, "outcome": None,
    }  # fmt: skip


def test_lines_come_while_the_run_goes_on(run: RunFolder, recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs.tracking, "_POLL_S", 0.01)
    steps(run, "sft", 1)
    tracked = Tracking(config(run, "tensorboard"), run)
    tracked.start()
    steps(run, "sft", 2)
    assert recorder.second.wait(60)  # before it is closed
    tracked.close()


def test_an_evaluation_is_handed_over_once(run: RunFolder, recorder: Recorder) -> None:
    steps(run, "sft", 1)
    evaluated(run)
    session(run, "tensorboard")
    session(run, "tensorboard")
    (outcome,) = recorder.outcomes
    assert outcome.measures == {"evaluation/sft/gold": 0.25}
    assert outcome.samples == [{"post": "p", "sft": "a", "gold_sft": 0.25}] and outcome.report == run.report
    run.evaluation.write_text(run.evaluation.read_text().replace("0.25", "0.75"))
    session(run, "tensorboard")
    assert recorder.outcomes[1].measures == {"evaluation/sft/gold": 0.75}


def test_a_tracker_that_fails_is_one_warning_and_gets_the_rest_later(
    run: RunFolder, recorder: Recorder, capsys: pytest.CaptureFixture[str]
) -> None:
    steps(run, "sft", 1, 2, 3)
    recorder.fails_at = ("sft", 2)
    session(run, "wandb")
    said = capsys.readouterr().out
    assert said.count("warning") == 1
    assert "tracking: wandb is left out from here on: ConnectionError: no route" in " ".join(said.split())
    recorder.fails_at = None
    session(run, "wandb")
    assert recorder.lines == [("sft", 1), ("sft", 2), ("sft", 3)]


def test_a_run_without_trackers_has_no_record(run: RunFolder) -> None:
    steps(run, "sft", 1)
    session(run)
    assert not (run.path / "tracking.json").exists()


def test_who_tracks_is_free_to_change(run: RunFolder) -> None:
    old, new = (parse_config({"name": "one", "tracking": names}, "test").model_dump() for names in ([], ["wandb"]))
    (change,) = config_changes(old, new)
    assert change.key == "tracking" and change.stages == ()


def test_a_missing_package_is_one_line_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_trackers(["tensorboard"])
    for name in ("wandb", "mlflow"):
        with pytest.raises(UserError, match=rf"tracking: {name} is not installed; pip install 'rayrlhf\[{name}\]'"):
            check_trackers([name])


def test_what_a_tracker_lacks_is_one_line_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    netrc = tmp_path / "netrc"
    netrc.touch()
    monkeypatch.setenv("NETRC", str(netrc))
    with pytest.raises(UserError, match="tracking: wandb has no API key; call `wandb login`"):
        check_trackers(["wandb"])
    with pytest.raises(UserError, match="tracking: mlflow does not know its server; set MLFLOW_TRACKING_URI"):
        check_trackers(["mlflow"])
    netrc.write_text("machine api.wandb.ai login user password secret\n")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    check_trackers(["wandb", "mlflow"])
    netrc.write_text("")
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_trackers(["wandb"])


def test_names_are_those_of_the_config() -> None:
    for name in TRACKERS:
        assert parse_config({"name": "one", "tracking": [name]}, "test").tracking == (name,)
        assert type(make_tracker(name)).__name__ == TRACKERS[name].kind
    with pytest.raises(UserError, match="tracking"):
        parse_config({"name": "one", "tracking": ["comet"]}, "test")


# ---- TensorBoard


def scalars(run: RunFolder, stage: str, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(run.path / "tensorboard" / stage))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_tensorboard_has_the_scalars_that_hold(run: RunFolder) -> None:
    """Those of the last attempt at each step, whether a restart came in one session or between two."""
    steps(run, "sft", 9)
    steps(run, "rl", 0, 1, 2, 3, 4, 5)
    session(run, "tensorboard")
    with MetricsWriter(run.path) as writer:  # resumed from the checkpoint of step 3
        for step in (3, 4):
            writer.write("rl", step, {"rl/loss": 10.0 + step})
        for step in (2, 3):  # and again, in the same session
            writer.write("rl", step, {"rl/loss": 20.0 + step, "rl/bad": float("nan")})
        writer.write_text("rl", 3, "sample", {"prompt": "why", "answer": "so"})
    session(run, "tensorboard")
    assert scalars(run, "rl", "rl/loss") == [(0, 0), (1, 1), (2, 22), (3, 23)]
    assert scalars(run, "sft", "sft/loss") == [(9, 9.0)]
    events = EventAccumulator(str(run.path / "tensorboard" / "rl"))
    events.Reload()
    assert "rl/bad" not in events.Tags()["scalars"]
    (text,) = events.Tensors("sample/text_summary")
    assert text.tensor_proto.string_val[0] == b"**prompt**: why\n\n**answer**: so"


# ---- MLflow and W&B themselves


def two_sessions(run: RunFolder, tracker: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Of which the second brings a step and the evaluation."""
    steps(run, "sft", 1, 2)
    session(run, tracker)
    steps(run, "sft", 3)
    evaluated(run)
    session(run, tracker)
    assert "warning" not in capsys.readouterr().out


def test_mlflow_has_config_metrics_table_and_report(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In MLflow's own file store; two sessions are one of its runs."""
    store = tmp_path / "mlruns"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    two_sessions(run, "mlflow", capsys)
    (own,) = [path.parent for path in store.glob("*/*/meta.yaml") if (path.parent / "metrics").is_dir()]
    values = [line.split()[1:] for line in (own / "metrics/sft/loss").read_text().splitlines()]
    assert values == [["1.0", "1"], ["2.0", "2"], ["3.0", "3"]]
    assert (own / "metrics/sft/time/step").exists()
    assert (own / "params/rl.steps").read_text() == "20"
    assert (own / "metrics/evaluation/sft/gold").read_text().split()[1] == "0.25"
    table = json.loads((own / "artifacts/samples.json").read_text())
    assert table["columns"] == ["post", "sft", "gold_sft"] and table["data"] == [["p", "a", 0.25]]
    assert (own / "artifacts/report.html").read_text() == "<html>"
    assert "status: 3" in (own / "meta.yaml").read_text()  # finished


def test_wandb_offline_has_config_metrics_table_and_report(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read back from the files that `wandb sync` uploads; two sessions have one name."""
    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    two_sessions(run, "wandb", capsys)
    wandb.teardown()  # its service, which writes the files, has ended
    files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2 and len({file.name for file in files}) == 1
    history, config, summary, artifacts = read_wandb(files)
    assert [(row["sft/step"], row["sft/loss"]) for row in history if "sft/loss" in row] == [(1, 1), (2, 2), (3, 3)]
    assert config["rl.steps"] == 20 and summary["evaluation/sft/gold"] == 0.25
    assert any(name.startswith("report-") for name in artifacts)
    (table,) = tmp_path.glob("wandb/offline-run-*/files/media/table/samples*.json")
    assert json.loads(table.read_text())["data"] == [["p", "a", 0.25]]


def read_wandb(files: list[Path]) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, Any], list[str]]:
    """History rows, config, summary and names of artifacts in the files that `wandb sync` reads."""
    from wandb.proto import wandb_internal_pb2

    def items(messages: Any) -> dict[str, Any]:
        return {"/".join(each.nested_key) or each.key: json.loads(each.value_json) for each in messages}

    history: list[dict[str, Any]] = []
    config: dict[str, Any] = {}
    summary: dict[str, Any] = {}
    artifacts: list[str] = []
    for content in (content for file in files for content in wandb_records(file.read_bytes())):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(content)
        kind = record.WhichOneof("record_type")
        if kind == "history":
            history.append(items(record.history.item))
        elif kind == "summary":
            summary |= items(record.summary.update)
        elif kind == "run":
            config |= items(record.run.config.update)
        elif kind == "artifact":
            artifacts.append(record.artifact.name)
    return history, config, summary, artifacts


def wandb_records(data: bytes) -> Iterator[bytes]:
    """The records of a file that W&B writes as LevelDB writes its log, behind a header of 7 bytes.

    https://github.com/google/leveldb/blob/main/doc/log_format.md
    """
    block, header, at, whole = 32768, 7, 7, b""
    while at + header <= len(data):
        if block - at % block < header:  # a record's header is in one block
            at += block - at % block
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        at += header + length
        whole += data[at - length : at]
        if kind in (1, 4):  # whole, or its last part
            yield whole
            whole = b""
