"""A run in rounds on Ray, ended in its second round and continued by the same command."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from rayrlhf.runs.metrics import read_metrics


# Two starts of Ray and of an engine, for what unit/test_rounds shows without any.
@pytest.mark.long
def test_the_second_round_goes_on_where_it_was_ended(finished: Any, start: Any, tmp_path: Path) -> None:
    """The first round is the finished run, taken over whole: its config is that of a run without rounds."""
    changes = [f"runs_dir={tmp_path}", "name=mine", f"from={finished.path}", "rounds={count: 2, answers: {sft: 1.0}}"]
    arguments = ["run", *finished.arguments, *changes]
    command = start("rayrlhf", *arguments)
    command.wait_for_line("collect: done in")
    os.kill(command.process.pid, signal.SIGTERM)
    assert command.wait().code == 130
    first, second = tmp_path / "mine/round-1", tmp_path / "mine/round-2"
    assert (first / "policy/model.safetensors").samefile(finished.path / "policy/model.safetensors")
    written = (second / "comparisons.parquet").stat().st_mtime_ns
    assert not (second / "policy").exists()

    outcome = start("rayrlhf", *arguments).wait()
    assert outcome.code == 0, f"{outcome.out[-3000:]}\n{outcome.err[-3000:]}"
    assert "collect: already done" in outcome.out and "2 of 2 done" in outcome.out
    assert (second / "comparisons.parquet").stat().st_mtime_ns == written
    old, new = (pq.read_table(each / "comparisons.parquet").column("id").to_pylist() for each in (first, second))
    assert new and not set(old) & set(new), "fresh prompts"

    learnt = read_metrics(second, "reward_model")[0]
    train = [sum(not held for held in _heldout(each)) for each in (first, second)]
    assert learnt["reward_model/prompts"] <= sum(train) and learnt["reward_model/prompts"] > train[1]
    sources = set(pq.read_table(second / "heldout_pairs.parquet").column("source").to_pylist())
    assert sources <= {"round-1", "round-2"} and "round-1" in sources

    # The policy goes on, and the reference is the SFT model: it is away from it at the first step.
    before, after = (read_metrics(each, "rl") for each in (first, second))
    assert after[0]["rl/kl_k3"] > 10 * abs(before[0]["rl/kl_k3"])
    assert all(line["rl/first_ratio_off_one"] < 1e-5 for line in after)
    # The round before answers the same prompts as it did then.
    then, now = (json.loads((each / "evaluation.json").read_text()) for each in (first, second))
    assert now["previous"]["gold"]["mean"] == pytest.approx(then["policy"]["gold"]["mean"], abs=1e-3)
    assert now["previous"]["length"]["mean"] == pytest.approx(then["policy"]["length"]["mean"], abs=0.1)
    assert now["policy"]["gold_win_rate_vs_previous"]["n"] == now["policy"]["gold"]["n"]
    assert now["sft"]["gold"]["mean"] == pytest.approx(then["sft"]["gold"]["mean"], abs=1e-3)

    shown = start("rayrlhf", "rounds", str(tmp_path / "mine")).wait()
    assert shown.code == 0 and "wins over SFT" in shown.out
    assert "mine/round-2" in start("rayrlhf", "status", str(tmp_path / "mine")).wait().out
    page = (tmp_path / "mine/report.html").read_text()
    assert "round-2/report.html" in page and (second / "report.html").is_file()


def _heldout(round_: Path) -> list[bool]:
    held: list[bool] = pq.read_table(round_ / "comparisons.parquet").column("heldout").to_pylist()
    return held
