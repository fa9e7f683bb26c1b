"""A run in an S3 bucket, worked on by a driver and a cluster that share nothing but the bucket."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from rayrlhf.runs.folder import RunFolder
from rayrlhf.runs.metrics import read_metrics
from tests.s3 import KEYS, S3, serving


class Bucket(NamedTuple):
    """A bucket with the run `quick` as it is before PPO."""

    s3: S3
    arguments: list[str]
    """What follows `rayrlhf run` to go on with it."""


@pytest.fixture
def bucket(finished: Any, before_ppo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    with serving() as s3:
        monkeypatch.setenv("RAYRLHF_CACHE", str(tmp_path / "seed"))
        run = RunFolder(s3.uri("runs/quick"))
        shutil.copytree(before_ppo, run.path, dirs_exist_ok=True)
        run.upload(*(path for path in run.path.iterdir() if path.name not in ("checkpoints", "tensorboard", ".lock")))
        same = [word for word in finished.arguments if not word.startswith("runs_dir=")]
        yield Bucket(s3, [*same, f"runs_dir={s3.uri('runs')}"])


def start_head(start: Any, monkeypatch: pytest.MonkeyPatch, cache: Path) -> Any:
    """A node with a cache of its own; `RAY_ADDRESS` is its address from now on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = int(listener.getsockname()[1])
    monkeypatch.setenv("RAYRLHF_CACHE", str(cache))
    ports = [f"--port={port}", "--dashboard-agent-listen-port=0", "--include-dashboard=false"]
    head = start("ray", "start", "--head", "--block", "--num-cpus=2", "--disable-usage-stats",
                 "--node-ip-address=127.0.0.1", *ports)  # fmt: skip
    head.wait_for_line(r".*Ray runtime started", 300)
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    return head


def files(path: Path) -> set[str]:
    """What a run folder holds, checkpoints and TensorBoard's events aside, whose names differ from run to run."""
    names = {str(p.relative_to(path)) for p in path.rglob("*") if p.is_file() and not p.name.startswith(".")}
    return {name for name in names if not name.startswith(("checkpoints/", "tensorboard/"))}


def test_a_run_in_a_bucket(
    bucket: Bucket, finished: Any, start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["run", *bucket.arguments, "ppo.checkpoint_every=1"]
    head = start_head(start, monkeypatch, tmp_path / "node")
    monkeypatch.setenv("RAYRLHF_CACHE", str(tmp_path / "driver"))
    outcome = start("rayrlhf", *arguments).wait(1000)
    assert outcome.code == 0, outcome.err
    assert "sft: already done, see s3://bucket/runs/quick/sft" in outcome.out
    policies = {path.relative_to(tmp_path).parts[0] for path in tmp_path.glob("*/**/policy/model.safetensors")}
    assert policies == {"node", "driver"}, "written on one, evaluated by the other"
    objects = bucket.s3.objects("runs/quick/")
    assert "sft/.done" in objects and "reward_model/.done" in objects and "policy/.done" in objects
    assert any(name.startswith("checkpoints/ppo-") for name in objects)
    assert ".lock" not in objects

    monkeypatch.delenv("RAY_ADDRESS")
    head.end()
    monkeypatch.setenv("RAYRLHF_CACHE", str(tmp_path / "third"))
    again = start("rayrlhf", *arguments).wait(300)
    assert again.code == 0 and "run 'quick' is finished: s3://bucket/runs/quick/evaluation.json" in again.out

    run = tmp_path / "run"
    for name, content in objects.items():
        path = run / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    assert files(run) == files(finished.path)
    # Runs repeat to the digit, and where their files are makes no difference to them.
    here, there = (
        [[line[name] for name in ("step", "ppo/reward/mean", "ppo/policy_loss")] for line in read_metrics(path, "ppo")]
        for path in (run, finished.path)
    )
    assert len(here) == len(there) == 3
    for ours, theirs in zip(here, there, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)
    evaluations = [json.loads((path / "evaluation.json").read_text()) for path in (run, finished.path)]
    for source in ("sft", "policy"):
        one, other = (evaluation[source]["reward"]["mean"] for evaluation in evaluations)
        assert one == pytest.approx(other, abs=1e-3)


# Two more starts of PPO for a checkpoint that is read from a bucket; what a checkpoint holds is tested without one.
@pytest.mark.long
def test_an_interrupted_run_in_a_bucket_continues_on_a_machine_that_has_nothing_of_it(
    bucket: Bucket, start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = 10_000  # it is interrupted, not waited for
    arguments = ["ppo", *bucket.arguments, f"ppo.steps={steps}", "ppo.checkpoint_every=1"]

    def run_until(step: int) -> str:
        command = start("rayrlhf", *arguments)
        command.wait_for_line(rf"ppo +{step}/{steps} ", 1000)
        os.killpg(command.process.pid, signal.SIGINT)
        outcome = command.wait(300)
        assert outcome.code == 130, outcome.err
        return str(outcome.out)

    monkeypatch.setenv("RAYRLHF_CACHE", str(tmp_path / "first"))
    run_until(3)
    objects = bucket.s3.objects("runs/quick/")
    assert any(name.startswith("checkpoints/ppo-") and name.endswith(".pt") for name in objects)
    assert "policy/.done" not in objects
    start_head(start, monkeypatch, tmp_path / "node")
    monkeypatch.setenv("RAYRLHF_CACHE", str(tmp_path / "second"))
    said = run_until(6)
    assert not re.search(rf"^ppo +1/{steps} ", said, re.MULTILINE), "it starts at the checkpoint"
    lines = read_metrics(bucket.s3.uri("runs/quick"), "ppo")
    assert [line["step"] for line in lines] == list(range(lines[0]["step"], lines[0]["step"] + len(lines)))
