"""What a step's numbers warn of: at a limit nothing, beyond it one line with the numbers in it."""

from __future__ import annotations

from typing import Any

import pytest

from rayrlhf.config import Config
from rayrlhf.config_alarms import AlarmsConfig
from rayrlhf.config_file import parse_config
from rayrlhf.reports.alarms import ALARMS, GOLD_DROP, STEPS_WITHOUT_SPREAD, alarms

START: dict[str, Any] = {
    "rl/score/mean": 0.5,
    "rl/score/std": 0.4,
    "rl/length/mean": 20.0,
    "rl/entropy": 3.0,
    "rl/kl": 0.0,
    "rl/distinct_2": 0.8,
}


def with_limits(**limits: float | None) -> Config:
    return parse_config({"name": "one", "alarms": limits}, "test")


@pytest.mark.parametrize(
    "metrics",
    [
        {},
        {"sft/loss": 3.0},
        {"rl/logprob_gap/mean": None},  # not finite: that is another warning
        {"rl/logprob_gap/mean": 1.0, "rollout/staleness/max": 1.0},  # of another policy
        {"non_finite": {}, "rollout/replacements": 0.0, "rl/judge_unusable": 0.0},
        START,
    ],
)
def test_nothing_to_warn_of(metrics: dict[str, Any]) -> None:
    assert alarms(metrics, with_limits(), START) == []


@pytest.mark.parametrize(
    ("limit", "value", "metric", "healthy", "beyond", "said"),
    [
        ("max_logprob_gap", 0.05, "rl/logprob_gap/mean", 0.05, 0.0512, "0.0512 nats a token"),
        ("max_first_ratio_off_one", 0.01, "rl/first_ratio_off_one", 0.01, 0.011, "off 1 by 0.011"),
        ("max_kl", 10.0, "rl/kl", 10.0, 10.1, "10.1 nats a response"),
        ("max_negative_kl", 1.0, "rl/kl", -1.0, -1.01, "-1.01 nats"),
        ("max_score_drop", 1.0, "rl/score/mean", 0.11, 0.09, "to 0.090 from 0.500"),  # 0.5 - 1.0 x 0.4
        ("min_score_spread", 0.1, "rl/score/std", 0.041, 0.039, "0.039, 0.4 at the start"),
        ("max_repetition", 0.2, "rl/repetition", 0.2, 0.21, "21% of the 4-grams"),
        ("min_distinct_2", 0.5, "rl/distinct_2", 0.41, 0.39, "0.390 of all 2-grams of the step's answers"),
        ("max_common_opening", 0.5, "rl/common_opening", 0.5, 0.52, "52% of the answers"),
        ("min_length", 0.5, "rl/length/mean", 10.0, 9.9, "9.9 tokens from 20.0"),
        ("min_eos_rate", 0.5, "rl/eos_rate", 0.5, 0.48, "only 48% of"),
        ("min_entropy", 0.2, "rl/entropy", 0.61, 0.59, "0.590 nats a token from 3.000"),
        ("max_clip_fraction", 0.5, "rl/clip_fraction", 0.5, 0.55, "55% of the tokens"),
        ("min_over_length", 0.02, "reward_model/minus_length", 0.021, 0.02, "(+0.020 of the pairs)"),
        ("max_gold_drop", 3.0, GOLD_DROP, 3.0, 3.1, "3.1 standard errors"),
        ("max_steps_without_spread", 3, STEPS_WITHOUT_SPREAD, 2, 3, "all responses of 3 steps in a row"),
    ],
)
def test_each_limit(limit: str, value: float, metric: str, healthy: float, beyond: float, said: str) -> None:
    config = with_limits(**{limit: value})
    assert alarms({metric: healthy}, config, START) == []
    (found,) = alarms({metric: beyond}, config, START)
    assert said in found.text and (found.key, found.value, found.limit) == (limit, beyond, value)
    assert any(word in found.text for word in ("usually", "precision", "collect more", "nothing to learn", "exploited"))
    assert alarms({metric: beyond}, with_limits(**{limit: None}), START) == [], "null turns the warning off"


def test_every_limit_of_the_config_is_watched() -> None:
    assert [alarm.limit for alarm in ALARMS if alarm.limit not in AlarmsConfig.model_fields] == []
    others = {"max_reward_drop", "gold_window"}  # of single rewards, and the steps that another one is about
    assert set(AlarmsConfig.model_fields) == {alarm.limit for alarm in ALARMS} | others


def test_a_run_without_its_first_step_is_not_compared_with_it() -> None:
    metrics = {"rl/score/mean": -9.0, "rl/score/std": 0.0, "rl/length/mean": 1.0, "rl/entropy": 0.0}
    assert alarms(metrics, with_limits(), {}) == []


def test_numbers_that_are_not_finite_are_named() -> None:
    metrics = {"rl/kl": None, "rl/value_loss": None, "non_finite": {"rl/kl": "nan", "rl/value_loss": "inf"}}
    (found,) = alarms(metrics, with_limits(), START)
    assert "rl/kl, rl/value_loss" in found.text and "learning rate" in found.text


def test_replaced_actors_are_counted() -> None:
    (found,) = alarms({"rollout/replacements": 2.0}, with_limits(), START)
    assert found.text.startswith("2 actor(s) died")


def test_several_at_once_are_several_lines() -> None:
    metrics = {"rl/logprob_gap/mean": 1.0, "rollout/replacements": 1.0, "non_finite": {"rl/kl": "nan"}}
    lines = alarms(metrics, with_limits(), START)
    assert len(lines) == 3 and not any("\n" in found.text for found in lines)


def test_a_reward_that_falls_while_the_score_rises() -> None:
    """With a limit of 0.5 standard deviations: `style` may fall from 0.2 to 0.1."""
    start = {**START, "rl/rewards/style": 0.2, "rl/reward_std/style": 0.2, "rl/rewards/model": 0.3}
    start |= {"rl/reward_std/model": 0.3}
    config = with_limits(max_reward_drop=0.5)
    step = {"rl/score/mean": 0.6, "rl/rewards/model": 0.51, "rl/rewards/style": 0.09}
    (warning,) = alarms(step, config, start)
    assert "reward 'style' fell to 0.090 from 0.200 at the start while the score rose" in warning.text
    assert alarms({**step, "rl/rewards/style": 0.11}, config, start) == []
    assert alarms({**step, "rl/score/mean": 0.5}, config, start) == []
    assert alarms(step, with_limits(max_reward_drop=None), start) == []
    assert alarms({**step, "rl/rewards/style": None}, config, start) == []
