"""A run in an S3 bucket: interrupted, and continued from a machine that has nothing of it."""

from __future__ import annotations

import json
import os
import signal
import socket
from pathlib import Path
from typing import Any

import pytest

from rayrlhf.runs.metrics import read_metrics
from tests.s3 import KEYS, serving

STEPS = 6


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def files(path: Path) -> set[str]:
    """What a run folder holds, checkpoints and TensorBoard's events aside, whose names differ from run to run."""
    names = {str(p.relative_to(path)) for p in path.rglob("*") if p.is_file() and not p.name.startswith(".")}
    return {name for name in names if not name.startswith(("checkpoints/", "tensorboard/"))}


@pytest.mark.timeout(900)
def test_a_run_in_a_bucket(finished: Any, start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    with serving() as s3:
        same = [word for word in finished.arguments if not word.startswith("runs_dir=")]
        arguments = ["run", *same, f"runs_dir={s3.uri('runs')}", f"ppo.steps={STEPS}", "ppo.checkpoint_every=1"]
        monkeypatch.setenv("RAYRLHF_CACHE", str(tmp_path / "first"))
        command = start("rayrlhf", *arguments)
        command.wait_for_line(rf"ppo 2/{STEPS} ", 600)
        os.killpg(command.process.pid, signal.SIGINT)
        outcome = command.wait(90)
        assert outcome.code == 130, outcome.err
        objects = s3.objects("runs/quick/")
        assert "sft/.done" in objects and "reward_model/.done" in objects and "policy/.done" not in objects
        assert any(name.startswith("checkpoints/ppo-") and name.endswith("/state.pt") for name in objects)
        assert ".lock" not in objects

        # The driver on one machine, everything else on another: what they share is the bucket.
        monkeypatch.setenv("RAYRLHF_CACHE", str(tmp_path / "node"))
        port = free_port()
        ports = [f"--port={port}", "--dashboard-agent-listen-port=0", "--include-dashboard=false"]
        head = start("ray", "start", "--head", "--block", "--num-cpus=2", "--disable-usage-stats",
                     "--node-ip-address=127.0.0.1", *ports)  # fmt: skip
        head.wait_for_line(r".*Ray runtime started", 120)
        monkeypatch.setenv("RAYRLHF_CACHE", str(tmp_path / "second"))
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
        outcome = start("rayrlhf", *arguments).wait(600)
        assert outcome.code == 0, outcome.err
        policies = {path.relative_to(tmp_path).parts[0] for path in tmp_path.glob("*/**/policy/model.safetensors")}
        assert policies == {"node", "second"}, "written on one, evaluated by the other"
        assert "sft: already done, see s3://bucket/runs/quick/sft" in outcome.out
        assert f"ppo 1/{STEPS} " not in outcome.out, "it starts at the checkpoint"
        for name, content in s3.objects("runs/quick/").items():
            path = tmp_path / "run" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

        monkeypatch.delenv("RAY_ADDRESS")
        head.end()
        again = start("rayrlhf", *arguments).wait(120)
        assert again.code == 0 and "run 'quick' is finished: s3://bucket/runs/quick/evaluation.json" in again.out

    run = tmp_path / "run"
    assert files(run) == files(finished.path)
    # Runs repeat to the digit, and where their files are makes no difference to them.
    assert [line["step"] for line in read_metrics(run, "ppo")] == list(range(1, STEPS + 1))
    for stage, metric in (("sft", "sft/loss"), ("reward_model", "reward_model/loss"), ("ppo", "ppo/reward/mean")):
        here, there = (
            [line[metric] for line in read_metrics(path, stage) if metric in line][: 1 if stage == "ppo" else None]
            for path in (run, finished.path)
        )
        assert here and here == pytest.approx(there, rel=1e-3)
    here, there = (json.loads((path / "evaluation.json").read_text()) for path in (run, finished.path))
    assert here["sft"]["reward"]["mean"] == pytest.approx(there["sft"]["reward"]["mean"], abs=1e-3)
