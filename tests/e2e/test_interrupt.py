"""Ctrl-C or SIGTERM in the middle of PPO, and the same command again."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from rayrlhf.runs.metrics import read_metrics

STEPS = 6


def ppo_lines(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if line]
    return [line for line in lines if line["stage"] == "ppo"]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_an_interrupted_run_continues_from_its_checkpoint(
    finished: Any, before_ppo: Path, start: Any, number: signal.Signals
) -> None:
    every = 1 if number == signal.SIGINT else 100  # SIGTERM asks for a checkpoint
    changes = [f"runs_dir={before_ppo.parent}", f"ppo.steps={STEPS}", f"ppo.checkpoint_every={every}"]
    arguments = ["ppo", *finished.arguments, *changes]
    command = start("rayrlhf", *arguments)
    command.wait_for_line(rf"ppo 2/{STEPS} ", 300)
    if number == signal.SIGINT:
        os.killpg(command.process.pid, number)  # as a terminal does: to the whole group
    else:
        os.kill(command.process.pid, number)  # as whoever started the command does
    outcome = command.wait(90)
    assert outcome.code == 130, outcome.err
    assert outcome.err == "interrupted: finished stages and checkpoints are kept; the same command continues\n"
    deadline = time.monotonic() + 15
    while command.processes() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert command.processes() == {}
    assert not (before_ppo / "policy").exists()
    assert not [p for p in before_ppo.iterdir() if p.name.startswith(".policy")]

    written = len(ppo_lines(before_ppo))
    assert 2 <= written < STEPS
    second = start("rayrlhf", *arguments).wait(400)
    assert second.code == 0, second.err
    assert (before_ppo / "policy" / "model.safetensors").is_file()
    lines = ppo_lines(before_ppo)
    assert 1 < lines[written]["step"] <= written + 1
    # The interrupt may have come between a step's line and its checkpoint: that step is done again, under its version.
    valid = read_metrics(before_ppo, "ppo")
    assert [line["step"] for line in valid] == list(range(1, STEPS + 1))
    versions = {line["step"]: line["ppo/weight_version"] for line in valid}
    assert all(versions[step] < versions[step + 1] for step in range(1, STEPS)), versions
    assert all(line["ppo/weight_version"] == versions[line["step"]] for line in lines), lines
    # The weights that the continued run publishes are those that it learns with.
    assert all(line["ppo/logprob_gap/mean"] < 1e-3 for line in lines)
    # It is the step that was asked for, not the first one again: the policy has moved away from the reference.
    assert lines[written]["ppo/kl_k3"] > 10 * abs(lines[0]["ppo/kl_k3"])
    assert f"ppo {lines[written]['step']}/{STEPS} " in second.out
    assert f"ppo {lines[written]['step'] - 1}/{STEPS} " not in second.out
