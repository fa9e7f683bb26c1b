"""The shrunken quick start computes today what it computed when its numbers were recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.golden import golden_numbers

GOLDEN = Path(__file__).parents[1] / "data" / "golden_quickstart.json"


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(GOLDEN.read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def computed(finished: Any) -> dict[str, Any]:
    return golden_numbers(finished.path)


def close(value: Any) -> Any:
    """Not equal to the last digit: processors without the same vector units add up in another order.

    That moves a loss by 1e-6 of it. It moves differences of nearly equal numbers by as much in absolute terms, hence
    the second limit. On the machine that the numbers are from, they repeat exactly.
    """
    return pytest.approx(value, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("stage", ["sft", "reward_model", "rl"])
def test_metrics_of_every_step(recorded: dict[str, Any], computed: dict[str, Any], stage: str) -> None:
    before, now = recorded["stages"][stage], computed["stages"][stage]
    assert len(now) == len(before)
    for step, (there, here) in enumerate(zip(before, now, strict=True)):
        assert there.keys() <= here.keys(), f"{stage}, line {step}: {there.keys() - here.keys()} are gone"
        for name, value in there.items():
            assert here[name] == close(value), f"{stage}, line {step}: {name}"


@pytest.mark.parametrize("source", ["sft", "policy", "title", "reference"])
def test_means_of_the_evaluation(recorded: dict[str, Any], computed: dict[str, Any], source: str) -> None:
    before, now = recorded["evaluation"][source], computed["evaluation"][source]
    assert {name: now.get(name) for name in before} == close(before)


def test_accuracies_of_the_reward_model(recorded: dict[str, Any], computed: dict[str, Any]) -> None:
    assert computed["reward_model"] == close(recorded["reward_model"])


def test_answers(recorded: dict[str, Any], computed: dict[str, Any]) -> None:
    assert computed["answers"] == recorded["answers"]
