"""A run in an S3 bucket, worked on by a driver and a cluster that share nothing but the bucket."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from rayrlhf.runs.folder import RunFolder
from rayrlhf.runs.metrics import read_metrics
from tests.s3 import KEYS, S3, serving
from tests.sockets import free_port


class Bucket(NamedTuple):
    s3: S3
    run: RunFolder
    """`quick`, of which the bucket has nothing yet."""
    arguments: list[str]
    """What follows `rayrlhf run` to go on with it."""

    def upload(self, run: Path) -> None:
        """Begin it with what a finished run has."""
        shutil.copytree(run, self.run.path, dirs_exist_ok=True)
        own = ("checkpoints", "tensorboard", ".lock")
        self.run.upload(*(path for path in self.run.path.iterdir() if path.name not in own))


@pytest.fixture
def bucket(finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    with serving() as s3:
        monkeypatch.setenv("RAYRLHF_CACHE", str(tmp_path / "seed"))
        same = [word for word in finished.arguments if not word.startswith("runs_dir=")]
        yield Bucket(s3, RunFolder(s3.uri("runs/quick")), [*same, f"runs_dir={s3.uri('runs')}"])


def start_node(start_head: Any, monkeypatch: pytest.MonkeyPatch, cache: Path) -> Any:
    """A node with a cache of its own; `RAY_ADDRESS` is its address from now on."""
    port = free_port()
    monkeypatch.setenv("RAYRLHF_CACHE", str(cache))
    ports = [f"--port={port}", "--dashboard-agent-listen-port=0", "--include-dashboard=false"]
    head = start_head("--node-ip-address=127.0.0.1", *ports)
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    return head


def written(bucket: Bucket, directory: Path) -> Path:
    """The run as it is in the bucket, in a directory."""
    run = directory / "run"
    for name, content in bucket.s3.objects("runs/quick/").items():
        path = run / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return run


def files(path: Path) -> set[str]:
    """What a run folder holds, checkpoints and TensorBoard's events aside, whose names differ from run to run."""
    names = {str(p.relative_to(path)) for p in path.rglob("*") if p.is_file() and not p.name.startswith(".")}
    return {name for name in names if not name.startswith(("checkpoints/", "tensorboard/"))}


# A cluster and a start of its workers for the caches of two machines; e2e/test_jobs has a stage in a bucket.
@pytest.mark.long
def test_a_stage_in_a_bucket(
    bucket: Bucket,
    finished: Any,
    before_rl: Path,
    start: Any,
    start_head: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The reward model: a node trains it, the driver shows what it is worth. Runs repeat, wherever their files are."""
    shutil.rmtree(before_rl / "reward_model")
    bucket.upload(before_rl)
    start_node(start_head, monkeypatch, tmp_path / "node")
    monkeypatch.setenv("RAYRLHF_CACHE", str(tmp_path / "driver"))
    outcome = start("rayrlhf", "reward-model", *bucket.arguments).wait()
    assert outcome.code == 0, outcome.err
    assert "reward_model: done in" in outcome.out and "see s3://bucket/runs/quick/reward_model" in outcome.out
    for name, caches in {"reward_model/model.safetensors": {"node"}, "reward_model.json": {"node", "driver"}}.items():
        assert {path.relative_to(tmp_path).parts[0] for path in tmp_path.glob(f"*/**/{name}")} >= caches, name
    assert "held-out pairs of" in outcome.out
    run = written(bucket, tmp_path)
    assert (run / "reward_model" / ".done").exists() and (run / ".lock").read_bytes() == b""
    assert list((run / "checkpoints").glob("reward_model-*/**/state.pt"))
    here, there = (
        {m["step"]: m["reward_model/loss"] for m in read_metrics(path, "reward_model") if "reward_model/loss" in m}
        for path in (run, finished.path)
    )
    assert len(here) == 2 and here == pytest.approx(there, rel=1e-3)
    accuracies = [json.loads((path / "reward_model.json").read_text())["accuracy"] for path in (run, finished.path)]
    assert accuracies[0] == accuracies[1]


# A start of PPO and evaluation, for what a stage and unit/test_store show of a bucket.
@pytest.mark.long
def test_a_run_in_a_bucket(
    bucket: Bucket,
    finished: Any,
    before_rl: Path,
    start: Any,
    start_head: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bucket.upload(before_rl)
    arguments = ["run", *bucket.arguments, "rl.checkpoint_every=1"]
    head = start_node(start_head, monkeypatch, tmp_path / "node")
    monkeypatch.setenv("RAYRLHF_CACHE", str(tmp_path / "driver"))
    outcome = start("rayrlhf", *arguments).wait()
    assert outcome.code == 0, outcome.err
    assert "sft: already done, see s3://bucket/runs/quick/sft" in outcome.out
    policies = {path.relative_to(tmp_path).parts[0] for path in tmp_path.glob("*/**/policy/model.safetensors")}
    assert policies == {"node", "driver"}, "written on one, evaluated by the other"
    objects = bucket.s3.objects("runs/quick/")
    assert "sft/.done" in objects and "reward_model/.done" in objects and "policy/.done" in objects
    assert any(name.startswith("checkpoints/rl-") for name in objects)
    assert objects[".lock"] == b""

    monkeypatch.delenv("RAY_ADDRESS")
    head.end()
    monkeypatch.setenv("RAYRLHF_CACHE", str(tmp_path / "third"))
    again = start("rayrlhf", *arguments).wait()
    assert again.code == 0 and "run 'quick' is finished: s3://bucket/runs/quick/evaluation.json" in again.out

    run = written(bucket, tmp_path)
    assert files(run) == files(finished.path)
    # Runs repeat to the digit, and where their files are makes no difference to them.
    here, there = (
        [[line[name] for name in ("step", "rl/reward/mean", "rl/policy_loss")] for line in read_metrics(path, "rl")]
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
    bucket: Bucket,
    before_rl: Path,
    start: Any,
    start_head: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bucket.upload(before_rl)
    steps = 10_000  # it is interrupted, not waited for
    arguments = ["rl", *bucket.arguments, f"rl.steps={steps}", "rl.checkpoint_every=1"]

    def run_until(step: int) -> str:
        command = start("rayrlhf", *arguments)
        command.wait_for_line(rf"rl +{step}/{steps} ")
        os.killpg(command.process.pid, signal.SIGINT)
        outcome = command.wait()
        assert outcome.code == 130, outcome.err
        return str(outcome.out)

    monkeypatch.setenv("RAYRLHF_CACHE", str(tmp_path / "first"))
    run_until(3)
    objects = bucket.s3.objects("runs/quick/")
    assert any(name.startswith("checkpoints/rl-") and name.endswith(".pt") for name in objects)
    assert "policy/.done" not in objects
    start_node(start_head, monkeypatch, tmp_path / "node")
    monkeypatch.setenv("RAYRLHF_CACHE", str(tmp_path / "second"))
    said = run_until(6)
    assert not re.search(rf"^rl +1/{steps} ", said, re.MULTILINE), "it starts at the checkpoint"
    lines = read_metrics(bucket.s3.uri("runs/quick"), "rl")
    assert [line["step"] for line in lines] == list(range(lines[0]["step"], lines[0]["step"] + len(lines)))
