"""`rayrlhf scale` on a run that is under way: a generator joins, and leaves, and the run ends as any."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from rayrlhf.runs.metrics import read_metrics

STEPS = 60


def generators_of_last_step(run: Path) -> float:
    lines = [line for line in (run / "metrics.jsonl").read_text().split("\n")[:-1] if '"ppo"' in line]
    return float(json.loads(lines[-1])["rollout/generators"])


@pytest.mark.timeout(900)
def test_a_run_is_scaled_up_and_down(finished: Any, before_ppo: Path, start: Any) -> None:
    changes = [f"runs_dir={before_ppo.parent}", f"ppo.steps={STEPS}", "resources.generators.cpus=0.25"]
    nobody = start("rayrlhf", "scale", str(before_ppo), "--generators", "2").wait(60)
    assert nobody.code == 2 and "scale: nobody works on" in nobody.err
    command = start("rayrlhf", "ppo", *finished.arguments, *changes)
    command.wait_for_line(rf"ppo +1/{STEPS} ", 300)

    def scaled(count: int) -> None:
        outcome = start("rayrlhf", "scale", str(before_ppo), "--generators", str(count)).wait(60)
        assert outcome.code == 0, outcome.err
        assert f"wanted from now on: {count} generators, 1 scorers" in outcome.out
        deadline = time.monotonic() + 200
        while generators_of_last_step(before_ppo) != count:
            assert time.monotonic() < deadline and command.process.poll() is None, "the run ended first"
            time.sleep(0.2)

    scaled(2)
    scaled(1)
    refused = start("rayrlhf", "scale", str(before_ppo), "--generators", "0").wait(60)
    assert refused.code == 2 and "at least one is needed" in refused.err
    outcome = command.wait(400)
    assert outcome.code == 0, outcome.err
    steps = read_metrics(before_ppo, "ppo")
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    assert {line["rollout/generators"] for line in steps} == {1.0, 2.0}
    # Newcomers sample from the learner's weights, and from no other.
    assert all(line["ppo/logprob_gap/mean"] < 1e-3 for line in steps)
    assert all(line["rollout/replacements"] == 0 for line in steps)
