"""Three rounds from one command: undisturbed, and killed once in each stage of the second round."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from rayrlhf.runs.metrics import read_metrics
from tests.golden import golden_numbers

KILLED = """
import os, re, signal, sys
from jobs.cli import main
from rayrlhf.runs.samples import KeptSamples

pattern, out, written = re.compile(sys.argv.pop(1), re.DOTALL), sys.stdout, []

class Watched:
    def write(self, text):
        out.write(text)
        written.append(text)
        if pattern.search("".join(written)):
            out.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    def __getattr__(self, name):
        return getattr(out, name)

keep = KeptSamples.write
def write(samples, *arguments):
    keep(samples, *arguments)
    print("samples are kept")
KeptSamples.write = write
sys.stdout = Watched()
sys.exit(main())
"""
"""The command `rayrlhf`, whose process dies by SIGKILL as soon as it has printed what a pattern says."""
MOMENTS = {
    "collect": "collect [─-].*samples are kept",  # of one of the two models that answer
    "reward_model": "reward_model +1/",
    "rl": "rl +2/3",
    "evaluate": "evaluate [─-].*samples are kept.*samples are kept",  # of two of the three models
}
"""When the process dies in a stage, after it has said that the second round begins."""


# Six starts of Ray and eight of engines, for what unit/test_rounds shows without any.
@pytest.mark.long
def test_three_rounds_are_the_same_after_a_kill_in_each_stage(finished: Any, start: Any, tmp_path: Path) -> None:
    """The first round begins with the reward model of the finished run: its config is that of a run without rounds.

    It has PPO of its own, since a run that is killed after two steps is to go on behind the first one.
    """

    def arguments(name: str) -> list[str]:
        changes = [f"runs_dir={tmp_path}", f"name={name}", f"from={finished.path}", "rl.checkpoint_every=1"]
        return ["run", *finished.arguments, *changes, "rounds={count: 3, stop: false, answers: {sft: 1.0}}"]

    undisturbed = start("rayrlhf", *arguments("whole"))
    outcome = undisturbed.wait()
    assert outcome.code == 0, f"{outcome.out[-3000:]}\n{outcome.err[-3000:]}"
    assert len(list(undisturbed.ray_directory.glob("ray/session_*_*"))) == 1, "one Ray serves all rounds"
    killed = []
    for stage, moment in MOMENTS.items():
        command = start("python", "-c", KILLED, f"round 2 of 3.*{moment}", *arguments("killed"))
        assert command.wait().code == -signal.SIGKILL, f"{stage}: {command.output()[-3000:]}"
        # Nobody ends Ray and the engines any more, but themselves.
        command.wait_until(lambda command=command: not command.processes(), "its processes end", running=False)
        killed.append(command.output())
        assert not (tmp_path / "killed/round-3").exists()
    outcome = start("rayrlhf", *arguments("killed")).wait()
    assert outcome.code == 0, f"{outcome.out[-3000:]}\n{outcome.err[-3000:]}"
    assert "evaluate: already done" not in outcome.out and "3 of 3 done" in outcome.out
    for stage, output in zip(list(MOMENTS)[:-1], killed[1:], strict=True):
        assert f"{stage}: done in" in output and f"{stage}: already done" not in output, "it went on in the stage"
    assert "samples are there from an earlier start" in killed[1]
    assert re.findall(r"rl +(\d)/3", killed[3])[-1] == "3" and not re.search("rl +1/3", killed[3]), "from a checkpoint"

    for name in ("round-2", "round-3"):
        whole, again = (tmp_path / run / name for run in ("whole", "killed"))
        assert pq.read_table(again / "comparisons.parquet") == pq.read_table(whole / "comparisons.parquet")
        assert golden_numbers(again) == golden_numbers(whole)
        for model in ("reward_model", "policy"):
            file = f"{model}/model.safetensors"
            assert (again / file).read_bytes() == (whole / file).read_bytes(), f"{name}: {file}"
    _look_at(start, finished.path, tmp_path / "whole")


def _look_at(start: Any, given: Path, run: Path) -> None:
    """What rounds hand on to each other, and what is shown of them."""
    first, second = run / "round-1", run / "round-2"
    assert (first / "reward_model/model.safetensors").samefile(given / "reward_model/model.safetensors")
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

    shown = start("rayrlhf", "rounds", str(run)).wait()
    assert shown.code == 0 and "wins over SFT" in shown.out
    assert f"{run.name}/round-3" in start("rayrlhf", "status", str(run)).wait().out
    page = (run / "report.html").read_text()
    assert "round-2/report.html" in page and (second / "report.html").is_file()


def _heldout(round_: Path) -> list[bool]:
    held: list[bool] = pq.read_table(round_ / "comparisons.parquet").column("heldout").to_pylist()
    return held
