"""PPO whose generators run ahead of the learner, as a user starts it: a config key more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rayrlhf.metrics import read_metrics


@pytest.mark.timeout(600)
def test_ppo_with_generation_ahead_of_the_learner(finished: Any, before_ppo: Path, start: Any) -> None:
    settings = [f"runs_dir={before_ppo.parent}", "ppo.steps=4", "ppo.max_staleness=1"]
    outcome = start("rayrlhf", "ppo", *finished.arguments, *settings).wait(400)
    assert outcome.code == 0, outcome.err
    assert "ppo 4/4 " in outcome.out and "ppo: done in" in outcome.out
    lines = read_metrics(before_ppo, "ppo")
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert [line["rollout/staleness/max"] for line in lines[1:]] == [1.0] * 3
    assert lines[0]["rollout/staleness/max"] == 0.0 and abs(lines[0]["ppo/kl"]) < 1e-3
    for line in lines:
        assert line["ppo/first_ratio_off_one"] < 1e-5
        assert 0.5 < line["ppo/importance_weight/mean"] < 1.5
        assert line["time/step"] == pytest.approx(line["time/sync"] + line["time/wait"] + line["time/learn"])
        assert {"idle/learner", "idle/generator-0", "idle/scorer-0"} <= line.keys()
    assert (before_ppo / "policy" / "model.safetensors").is_file()
