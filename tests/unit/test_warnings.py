"""When a warning is said, what is kept of it, and what takes several steps to see: by hand-made numbers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from rayrlhf.config import Config
from rayrlhf.config_file import parse_config
from rayrlhf.reports.warnings import QUIET, GoldAgainstScore, Watch, warnings_of
from rayrlhf.runs.metrics import MetricsWriter, read_metrics


def config_with(**alarms: Any) -> Config:
    return parse_config({"name": "one", "alarms": alarms}, "test")


def kl(step: int, value: float) -> dict[str, Any]:
    return {"stage": "rl", "step": step, "rl/kl": value}


def test_a_warning_is_said_when_it_begins() -> None:
    """The example of the module's head."""
    watch = Watch(config_with())
    said = [watch.add(kl(step, value)) for step, value in enumerate([10, 20, 40, 45, 20, 50], start=1)]
    assert [len(texts) for texts in said] == [0, 0, 1, 0, 0, 0]
    (warned,) = watch.found.values()
    assert (warned.first, warned.last, warned.steps, warned.value, warned.latest) == (3, 6, 3, 40, 50)
    assert warned.where == "rl steps 3 to 6 (3 of them)" and warned.numbers == "max_kl 30, 40 at first, 50 at last"


def test_it_is_said_again_after_a_long_silence() -> None:
    watch = Watch(config_with())
    steps = {1: 40.0, 1 + QUIET: 41.0, 2 + 2 * QUIET: 42.0}
    said = {step: watch.add(kl(step, value)) for step, value in steps.items()}
    assert [bool(texts) for texts in said.values()] == [True, False, True]
    assert "42.0 nats" in said[2 + 2 * QUIET][0]


def test_several_lines_of_a_step_count_once() -> None:
    watch = Watch(config_with())
    assert watch.add(kl(4, 40.0)) and not watch.add(kl(4, 41.0))
    (warned,) = watch.found.values()
    assert warned.steps == 1 and warned.where == "rl step 4" and warned.numbers == "max_kl 30, 40 here"


# ---- scores without spread


def score(step: int, mean: float, std: float) -> dict[str, Any]:
    return {"stage": "rl", "step": step, "rl/score/mean": mean, "rl/score/std": std}


def test_three_steps_in_a_row_without_spread_stop_the_stage() -> None:
    """From the first step on, where there is no start to compare with; a deviation of 1e-9 is one of rounding."""
    watch = Watch(config_with())
    stds = [0.0, 1e-9, 0.1, 0.0, 0.0]
    for step, std in enumerate(stds, start=1):
        watch.add(score(step, -1.0, std))
        assert watch.reason_to_stop is None
    (said,) = watch.add(score(6, -1.0, 0.0))
    assert said.startswith("all responses of 3 steps in a row scored the same")
    assert watch.reason_to_stop is not None and watch.reason_to_stop.startswith(said)
    assert (
        "rl.missing_eos_reward=null" in watch.reason_to_stop
        and "alarms.max_steps_without_spread=null" in watch.reason_to_stop
    )
    watch.add(score(7, -0.9, 0.2))
    assert watch.reason_to_stop is None


def test_the_stop_can_be_turned_off() -> None:
    watch = Watch(config_with(max_steps_without_spread=None))
    assert [watch.add(score(step, -1.0, 0.0)) for step in range(1, 9)] == [[]] * 8 and watch.reason_to_stop is None


# ---- gold falls while the score rises


def both(gold: float, of_score: float, n: float = 4) -> dict[str, Any]:
    means = {"rl/gold/mean": gold, "rl/gold/std": 0.2, "rl/score/mean": of_score, "rl/score/std": 0.4}
    return {**means, "rl/responses": n}


def test_gold_against_score_by_hand() -> None:
    """Windows of 2 steps, 4 prompts a step: a window's mean of gold has the variance 0.2^2 / 4 / 2 = 0.005, the
    difference of two has 0.01, so an error of 0.1; the score's is 0.2."""
    trend = GoldAgainstScore(2, samples_per_prompt=1)
    steps = [both(0.5, 0.0), both(0.7, 0.2), both(0.5, 0.4), both(0.3, 0.6)]
    drops = [trend.drop(step) for step in steps]
    assert drops[:3] == [None, None, None]
    # Gold fell from 0.6 to 0.4, 2 errors; the score rose from 0.1 to 0.5, 2 errors.
    assert drops[3] == pytest.approx(2.0)
    # Best is now the window of steps 1 and 2 still (0.6, the next has 0.6): gold 0.2, score 0.8.
    assert trend.drop(both(0.1, 1.0)) == pytest.approx(min(4.0, 3.5))
    # The score came back to where it was: nothing is exploited.
    trend.drop(both(0.1, 0.0))
    assert trend.drop(both(0.1, 0.0)) == 0.0


def test_responses_to_one_prompt_count_as_one() -> None:
    one, four = GoldAgainstScore(1, samples_per_prompt=1), GoldAgainstScore(1, samples_per_prompt=4)
    for trend in (one, four):
        trend.drop(both(0.6, 0.0, n=16))
    drops = [trend.drop(both(0.5, 5.0, n=16)) for trend in (one, four)]
    assert drops == [pytest.approx(0.1 / math.sqrt(2 * 0.04 / 16)), pytest.approx(0.1 / math.sqrt(2 * 0.04 / 4))]


def test_gold_that_falls_is_warned_of_once() -> None:
    watch = Watch(config_with(gold_window=2, max_gold_drop=2.5))
    gold = [0.5, 0.7, 0.5, 0.3, 0.1, 0.1]
    said = [watch.add({"stage": "rl", "step": i + 1, **both(g, 0.2 * i)}) for i, g in enumerate(gold)]
    assert [len(texts) for texts in said] == [0, 0, 0, 0, 1, 0]
    assert "gold fell 3.0 standard errors" in said[4][0]


# ---- what a run has of them


def test_what_stages_said_and_what_steps_show_are_one_list(tmp_path: Path) -> None:
    config = config_with()
    with MetricsWriter(tmp_path) as writer:
        writer.warn("run", 2, ["not clearly better than length"])
        writer.write("run", 2, {"time/reward_model": 4.0})
        writer.write("sft", 1, {"sft/loss": float("nan")})
        watch = Watch(config)
        for step, value in enumerate([10.0, 40.0, 45.0], start=1):
            writer.write("rl", step, {"rl/kl": value}, watch.add)
        writer.warn("rl", 3, ["something else", "something else"])
    lines = read_metrics(tmp_path)
    assert [line["warnings"] for line in lines if "warnings" in line] == [
        ["not clearly better than length"],
        [watch.found["max_kl"].text],
        ["something else", "something else"],
    ]
    found = warnings_of(lines, config)
    assert [warned.line for warned in found] == [
        "sft step 1: not finite: sft/loss; usually a learning rate that is too high",
        "reward_model: not clearly better than length",
        f"rl steps 2 to 3: {watch.found['max_kl'].text} (max_kl 30, 40 at first, 45 at last)",
        "rl step 3: something else",
    ]


def test_a_limit_that_changed_later_hides_nothing() -> None:
    lines = [kl(1, 10.0), {**kl(2, 40.0), "warnings": ["the policy is far away"]}]
    (warned,) = warnings_of(lines, config_with(max_kl=None))
    assert warned.line == "rl step 2: the policy is far away"


def test_several_writers_of_a_step_keep_all_warnings(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.warn("rl", 1, ["first"])
        writer.write("rl", 1, {"rl/kl": 1.0})
        writer.warn("rl", 1, ["second", "first"])
    (line,) = read_metrics(tmp_path)
    assert line["warnings"] == ["first", "second"] and line["rl/kl"] == 1.0
