"""What a step's numbers warn of."""

from __future__ import annotations

from typing import Any

import pytest

from rayrlhf.alarms import alarms
from rayrlhf.config import Config, parse_config


@pytest.fixture
def config() -> Config:
    return parse_config({"name": "one", "ppo": {"max_logprob_gap": 0.05}}, "test")


@pytest.mark.parametrize(
    "metrics",
    [
        {},
        {"sft/loss": 3.0},
        {"ppo/logprob_gap/mean": 0.05, "rollout/replacements": 0.0},  # at the limit, not above it
        {"ppo/logprob_gap/mean": None},  # not finite: that is another warning
        {"non_finite": {}},
    ],
)
def test_nothing_to_warn_of(config: Config, metrics: dict[str, Any]) -> None:
    assert alarms(metrics, config) == []


def test_a_gap_between_generator_and_learner(config: Config) -> None:
    (line,) = alarms({"ppo/logprob_gap/mean": 0.0512}, config)
    assert "0.0512 nats a token" in line and "stale weights" in line
    assert alarms({"ppo/logprob_gap/mean": 0.0512}, parse_config({"name": "one"}, "test")) == []  # the default is 0.1


def test_numbers_that_are_not_finite_are_named(config: Config) -> None:
    (line,) = alarms(
        {"ppo/kl": None, "ppo/value_loss": None, "non_finite": {"ppo/kl": "nan", "ppo/value_loss": "inf"}}, config
    )
    assert "ppo/kl, ppo/value_loss" in line and "learning rate" in line


def test_replaced_actors_are_counted(config: Config) -> None:
    (line,) = alarms({"rollout/replacements": 2.0}, config)
    assert line.startswith("2 actor(s) died")


def test_several_at_once_are_several_lines(config: Config) -> None:
    lines = alarms({"ppo/logprob_gap/mean": 1.0, "rollout/replacements": 1.0, "non_finite": {"ppo/kl": "nan"}}, config)
    assert len(lines) == 3 and not any("\n" in line for line in lines)
