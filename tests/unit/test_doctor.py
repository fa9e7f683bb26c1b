"""`rayrlhf doctor`: the archive has what helps and no secret, and the cause is the run's own last word."""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
import time
from pathlib import Path

import pytest

from jobs.doctor import doctor, most_likely_cause
from rayrlhf.errors import UserError
from rayrlhf.runs.error_log import RAY, entries, note, record
from rayrlhf.runs.folder import RunFolder
from rayrlhf.runs.metrics import MetricsWriter

SECRET = "hf_abcdefghijklmnopqrstuvwxyz"


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run that stopped in its first stage, after three steps."""
    folder = RunFolder(tmp_path / "runs" / "one")
    folder.path.mkdir(parents=True)
    folder.config.write_text("name: one  # proxy: http://ann:hunter2@host/v1\n")
    with MetricsWriter(folder.address) as metrics:
        for step in (1, 2, 3):
            metrics.write("sft", step, {"sft/loss": 1.0 / step})
        metrics.write_text("sft", 3, "sample", {"prompt": "a private prompt", "reference": "", "answer": ""})
    return folder


def raised(error: Exception) -> Exception:
    try:
        raise error
    except Exception as caught:
        return caught


def unpacked(archive: Path) -> dict[str, str]:
    with tarfile.open(archive) as opened:
        members = opened.getmembers()
        assert all(member.isfile() and not member.name.startswith(("/", "..")) for member in members)
        return {m.name.split("/", 1)[1]: opened.extractfile(m).read().decode() for m in members}  # type: ignore[union-attr]


def test_the_archive_has_what_helps_and_no_secret(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    logs = tmp_path / "session" / "logs"
    logs.mkdir(parents=True)
    for name, text in {
        "worker-ab-ffffffff-11.err": f":job_id:02000000\n:actor_name:Generator\n:actor_name:generator-0\n"
        f"TOKEN={SECRET}\nlast words\n",
        "worker-cd-02000000-12.err": ":job_id:02000000\n:actor_name:somebody\n",
        "worker-ef-03000000-13.err": ":job_id:03000000\n:actor_name:Generator\n",
        "python-core-worker-ab_11.log": "core of 11",
        "python-core-worker-cd_12.log": "core of 12",
        "raylet.out": "x" * 300_000 + "end of raylet",
    }.items():
        (logs / name).write_text(text)
    record(run, raised(ValueError(f"key {SECRET}")), "sft step 4: ValueError: bad", f"{RAY}{logs.parent}, job 02000000")
    archive, cause = doctor(run.address, tmp_path / "found.tar.gz")
    assert archive == tmp_path / "found.tar.gz" and cause == "sft step 4: ValueError: bad"
    files = unpacked(archive)
    assert {name for name in files if name.startswith("ray/")} == {
        "ray/worker-ab-ffffffff-11.err", "ray/python-core-worker-ab_11.log", "ray/raylet.out",
    }  # fmt: skip
    assert "last words" in files["ray/worker-ab-ffffffff-11.err"]
    assert len(files["ray/raylet.out"]) == 200_000 and files["ray/raylet.out"].endswith("end of raylet")
    assert "Traceback (most recent call last)" in files["errors.log"]
    assert [json.loads(line).get("sft/loss") for line in files["metrics.jsonl"].splitlines()][:3] == [1, 1 / 2, 1 / 3]
    digest = hashlib.blake2b(run.config.read_bytes(), digest_size=16).hexdigest()
    (row,) = (line.split() for line in files["layout.txt"].splitlines() if line.endswith(" config.yaml"))
    assert row[0] == str(run.config.stat().st_size) and row[2] == digest
    assert (
        "rayrlhf " in files["machine.txt"] and "MemTotal" in files["machine.txt"] and "disk of" in files["machine.txt"]
    )
    assert "http://***@host/v1" in files["config.yaml"]
    for text in files.values():
        assert not any(word in text for word in (SECRET, "hunter2", "a private prompt"))


def test_the_most_likely_cause_is_the_last_word_of_the_run(run: RunFolder) -> None:
    def cause() -> str:
        text = run.errors.read_text() if run.errors.exists() else ""
        return most_likely_cause(run, text, now)

    now = time.time() + 60
    assert cause().startswith("the run ended in sft after step 3, 1 min 0") and "dmesg" in cause()
    record(run, raised(ValueError("x")), "sft step 4: ValueError: x")
    assert cause() == "sft step 4: ValueError: x"
    note(run, "generator-0 died", "its stacks")
    assert cause() == "generator-0 died"
    assert [len(entry.splitlines()) > 1 for entry in entries(run.errors.read_text())] == [True, True]
    with MetricsWriter(run.address) as metrics:
        metrics.write("sft", 4, {"sft/loss": 0.1})
    text = run.errors.read_text().replace(time.strftime("==== %Y"), "==== 2001")
    run.errors.write_text(text)
    assert cause().startswith("the run ended in sft after step 4")
    assert cause().endswith("the last entry of its error log is older: generator-0 died")
    with run.lock():
        assert cause() == f"nothing has ended the run: it is being written by {run.holder()}"
    for stage in ("sft", "comparisons.parquet", "reward_model", "policy", "evaluation.json"):
        (run.path / stage).touch()
    assert cause() == "nothing: the run is finished"
    run.config.write_text("name: [")
    assert str(run.config) in cause()


def test_what_cannot_be_packed_is_one_line(run: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere: no such folder"):
        doctor(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="cannot be written .*; choose another place: --output"):
        doctor(run.address, run.config / "x.tar.gz")


def test_an_error_log_that_cannot_be_written_is_an_os_error(run: RunFolder) -> None:
    run.errors.mkdir()
    with pytest.raises(OSError):
        note(run, "x")
    os.rmdir(run.errors)
