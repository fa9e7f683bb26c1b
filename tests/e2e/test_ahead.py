"""PPO whose generators run ahead of the learner, and the evaluation after it, as a user starts them: a key more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rayrlhf.runs.metrics import read_metrics


@pytest.mark.timeout(600)
def test_ppo_with_generation_ahead_of_the_learner(finished: Any, before_ppo: Path, start: Any) -> None:
    settings = [f"runs_dir={before_ppo.parent}", "ppo.steps=4", "ppo.max_staleness=1"]
    outcome = start("rayrlhf", "run", *finished.arguments, *settings).wait(500)
    assert outcome.code == 0, outcome.err
    assert "ppo 4/4 " in outcome.out and "ppo: done in" in outcome.out and "evaluate: done in" in outcome.out
    lines = read_metrics(before_ppo, "ppo")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [line["rollout/staleness/max"] for line in lines[1:]] == [1.0] * 3
    assert lines[0]["rollout/staleness/max"] == 0.0 and abs(lines[0]["ppo/kl"]) < 1e-3
    for line in lines:
        assert line["ppo/first_ratio_off_one"] < 1e-5
        assert 0.5 < line["ppo/importance_weight/mean"] < 1.5
        assert line["time/step"] == pytest.approx(line["time/sync"] + line["time/wait"] + line["time/learn"])
        assert {"idle/learner", "idle/generator-0", "idle/scorer-0"} <= line.keys()
    evaluation = json.loads((before_ppo / "evaluation.json").read_text())
    assert evaluation["policy"]["reward"]["mean"] != evaluation["sft"]["reward"]["mean"]
