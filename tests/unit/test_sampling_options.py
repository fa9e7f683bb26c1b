"""Options of sampling: those that there are, and what is said of those that other programs have."""

from __future__ import annotations

from typing import Any

import pytest

from rayrlhf.config_file import parse_config
from rayrlhf.errors import UserError
from rayrlhf.reports.remarks import remarks
from rayrlhf.rewards.content import Vocabulary
from rayrlhf.rewards.gold import gold_labeller, gold_measures
from rayrlhf.sections import DrawConfig

GAME = {"path": "rayrlhf.environments.guess:Guess"}


def parsed(**tree: Any) -> Any:
    return parse_config({"name": "x", **tree}, "test")


@pytest.mark.parametrize(
    ("section", "key", "said"),
    [
        ("rl", "top_p", "the ratio of new to old policy is undefined; use rl.temperature, or top_p in collect"),
        ("rl", "top_k", "or top_k in collect and evaluate"),
        ("sft", "min_p", "or min_p in collect and evaluate"),
        ("evaluate", "repetition_penalty", "take a reward that counts repetitions"),
        ("rl", "presence_penalty", "no model here computes"),
        ("rl", "frequency_penalty", "no model here computes"),
        ("collect", "logit_bias", "take a reward for or against these tokens"),
        ("rl", "stop", "name single tokens in data.stop_tokens"),
        ("evaluate", "stop_strings", "name single tokens in data.stop_tokens"),
        ("rl", "n", "samples of a prompt are rl.samples_per_prompt, collect.answers_per_prompt and evaluate.best_of"),
        ("rl", "best_of", "rl.samples_per_prompt"),
        ("rl", "min_tokens", "for all stages it is data.min_response_tokens"),
        ("evaluate", "max_new_tokens", "for all stages it is data.max_response_tokens"),
    ],
)
def test_an_option_of_other_programs_gets_its_reason(section: str, key: str, said: str) -> None:
    for tree in ({section: {key: 1}}, {section: {key: "###"}}):
        with pytest.raises(UserError) as raised:
            parsed(**tree)
        message = str(raised.value)
        assert message.startswith(f"test: there is no key '{section}.{key}': ") and said in message
        assert "\n" not in message


def test_a_truncation_is_for_what_nothing_is_learnt_from() -> None:
    config = parsed(collect={"top_p": 0.9, "temperature": 1.0}, evaluate={"top_k": 5, "min_p": 0.1, "best_of": 4})
    assert (config.collect.top_p, config.evaluate.top_k, config.evaluate.min_p) == (0.9, 5, 0.1)
    assert (config.collect.temperature, config.evaluate.temperature) == (1.0, 0.01)
    whole = DrawConfig(temperature=config.rl.temperature)
    assert config.rl.draw == whole and (whole.top_p, whole.top_k, whole.min_p) == (1.0, 0, 0.0)
    with pytest.raises(UserError, match=r"key 'collect\.top_p'"):
        parsed(collect={"top_p": 0.0})


def test_a_response_must_be_able_to_end() -> None:
    assert parsed().data.min_response_tokens == 0
    assert parsed(data={"min_response_tokens": 47}).data.min_response_tokens == 47
    with pytest.raises(UserError, match=r"min_response_tokens \(48\) must be below max_response_tokens \(48\)"):
        parsed(data={"min_response_tokens": 48, "max_response_tokens": 48})


def test_an_environment_whose_rewards_nobody_asks_for_is_said() -> None:
    rule = {"kind": "python", "name": "rule", "path": "rayrlhf.rewards.verifiable:exact"}
    (line,) = remarks(parsed(environment=GAME, rewards=[rule]))
    assert "its rewards are not used: no reward has the kind environment" in line
    assert remarks(parsed(environment=GAME, rewards=[rule, {"kind": "environment"}])) == []
    assert remarks(parsed(rewards=[rule])) == []


def test_a_trajectory_in_turns_has_no_gold_measure() -> None:
    assert gold_labeller(parsed(), Vocabulary()) is not None
    assert gold_labeller(parsed(environment=GAME), Vocabulary()) is None
    assert gold_measures(None, [], []) is None
