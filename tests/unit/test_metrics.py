"""metrics.jsonl survives kills, restarts and NaN."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rayrlhf.runs.metrics import MetricsWriter, read_metrics


def lines(run_dir: Path) -> list[str]:
    return (run_dir / "metrics.jsonl").read_text().splitlines()


def test_a_line_is_stage_step_time_and_plain_numbers(tmp_path: Path) -> None:
    before = time.time()
    with MetricsWriter(tmp_path) as writer:
        writer.write("rl", 0, {"rl/kl": torch.tensor(0.5), "rl/reward/mean": np.float32(0.25), "time/step": 3})
        writer.write("rl", 1, {"rl/kl": 1.5})
    first, second = (json.loads(line) for line in lines(tmp_path))
    assert before - 1 <= first.pop("time") <= time.time() + 0.001, "it is rounded to milliseconds"
    assert first == {"stage": "rl", "step": 0, "rl/kl": 0.5, "rl/reward/mean": 0.25, "time/step": 3.0}
    assert list(second) == ["stage", "step", "time", "rl/kl"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_values_are_null_and_said(tmp_path: Path, value: float, caplog: pytest.LogCaptureFixture) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.write("rl", 4, {"rl/policy_loss": value, "rl/kl": 1.0})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    line = json.loads(lines(tmp_path)[0], parse_constant=refuse)
    assert line["rl/policy_loss"] is None
    assert line["rl/kl"] == 1.0
    assert line["non_finite"] == {"rl/policy_loss": str(value)}
    assert "rl/policy_loss" in caplog.text


def test_a_restart_supersedes_from_its_first_step_on(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.write("sft", 9, {"sft/loss": 9.0})
        for step in range(6):
            writer.write("rl", step, {"rl/kl": float(step)})
    with MetricsWriter(tmp_path) as writer:  # resumed from the checkpoint of step 3, ended after step 4
        for step in (3, 4):
            writer.write("rl", step, {"rl/kl": 10.0 + step})
    got = [(line["stage"], line["step"], line.get("rl/kl")) for line in read_metrics(tmp_path)]
    assert got == [("sft", 9, None), ("rl", 0, 0), ("rl", 1, 1), ("rl", 2, 2), ("rl", 3, 13), ("rl", 4, 14)]
    assert [line["step"] for line in read_metrics(tmp_path, "sft")] == [9]


def test_lines_of_one_step_add_up_and_the_last_value_wins(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.write("sft", 5, {"sft/loss": 2.0})
        writer.write("sft", 5, {"sft/rouge1": 0.3, "sft/loss": 1.0})
    (line,) = read_metrics(tmp_path)
    assert (line["sft/loss"], line["sft/rouge1"]) == (1.0, 0.3)


def test_torn_last_line_is_left_out_and_does_not_swallow_the_next(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        for step in range(3):
            writer.write("rl", step, {"rl/kl": float(step)})
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-7])
    assert [line["step"] for line in read_metrics(tmp_path)] == [0, 1]
    with MetricsWriter(tmp_path) as writer:
        writer.write("rl", 2, {"rl/kl": 7.0})
    assert [(line["step"], line["rl/kl"]) for line in read_metrics(tmp_path)] == [(0, 0.0), (1, 1.0), (2, 7.0)]


def test_nothing_written_reads_as_nothing(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []


def test_two_processes_append_whole_lines(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom rayrlhf.runs.metrics import MetricsWriter\n"
        "with MetricsWriter(sys.argv[1]) as w:\n"
        "    for step in range(300): w.write(sys.argv[2], step, {f'{sys.argv[2]}/value/{i}': i for i in range(40)})\n"
    )
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    runs = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), stage], env=env) for stage in ("a", "b")]
    assert [run.wait(timeout=300) for run in runs] == [0, 0]
    got = [(line["stage"], line["step"], len(line)) for line in read_metrics(tmp_path)]
    assert sorted(got) == [(stage, step, 43) for stage in "ab" for step in range(300)]


def test_lines_that_nobody_wrote_are_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What a disk or an editor makes of a line; and what `MetricsWriter` writes stays, null and texts included."""
    good = {"stage": "rl", "step": 1, "time": 5.0}
    foreign: list[Any] = [
        7, [], {"stage": "rl"}, {**good, "step": -1}, {**good, "step": 1.5}, {**good, "step": True},
        {**good, "step": 10**400}, {**good, "time": None}, {**good, "time": 1e300}, {**good, "stage": ["rl"]},
        {**good, "rl/kl": "0.5"}, {**good, "rl/kl": 10**400}, {**good, "warnings": "text"}, {**good, "sample": 3},
    ]  # fmt: skip
    kept = {
        **good,
        "step": 2,
        "rl/kl": None,
        "non_finite": {"rl/kl": "nan"},
        "warnings": ["w"],
        "sample": {"a": "b"},
        "note": "n",
    }
    lines = [*map(json.dumps, foreign), '{"stage": "rl", "step": 3, "time": NaN}', "[" * 5000, json.dumps(kept)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert read_metrics(tmp_path) == [kept]
    assert f"{len(foreign) + 2} lines are torn or foreign and left out (first: line 1)" in caplog.text
