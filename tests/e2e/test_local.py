"""`--local`: a stage in one process, so that a debugger works."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rayrlhf.metrics import read_metrics


@pytest.mark.timeout(600)
def test_ppo_in_one_process(finished: Any, before_ppo: Path, start: Any) -> None:
    arguments = [*finished.arguments, f"runs_dir={before_ppo.parent}", "ppo.steps=2"]
    command = start("python", "-m", "jobs.ppo", "--local", "--config", *arguments)
    command.wait_for_line(r"ppo 1/2 ", 300)
    assert list(command.processes()) == [command.process.pid]
    outcome = command.wait(120)
    assert outcome.code == 0, outcome.err
    assert not any(command.ray_directory.iterdir()), "Ray was started"
    assert "ppo: done in" in outcome.out
    lines = read_metrics(before_ppo, "ppo")
    assert [line["step"] for line in lines] == [0, 1]
    assert abs(lines[0]["ppo/kl"]) < 1e-3
    assert all(line["ppo/logprob_gap/mean"] < 1e-3 for line in lines)
    assert (before_ppo / "policy" / "model.safetensors").is_file()
    # The same prompts with the same seeds as in the run on Ray: the first batch is the same.
    on_ray = read_metrics(finished.path, "ppo")[0]
    for name in ("ppo/length/mean", "ppo/eos_rate", "ppo/score/mean"):
        assert lines[0][name] == pytest.approx(on_ray[name], abs=1e-4)
