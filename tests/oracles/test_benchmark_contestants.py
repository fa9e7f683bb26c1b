"""The contestants of the cheap benchmarks still run, on a few rows and in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import dpo, learner, reward_model, sft
from benchmarks.harness import Contestant
from benchmarks.workload import write_reward_model

# What users run does not depend on them: they are to work when a release is measured.
pytestmark = pytest.mark.long


@pytest.mark.parametrize("make", [sft.Ours, sft.Transformers])
def test_sft(make: Callable[..., Contestant]) -> None:
    assert make(4, 2).run(0)["rows/s"] > 0


@pytest.mark.parametrize("make", [reward_model.Ours, reward_model.TRL])
def test_reward_model(make: Callable[..., Contestant]) -> None:
    assert make(2, 3, 2).run(0)["prompts/s"] > 0


@pytest.mark.parametrize("make", [dpo.Ours, dpo.TRL])
def test_dpo(make: Callable[..., Contestant]) -> None:
    assert make(2, 3, 2).run(0)["prompts/s"] > 0


def test_learner_and_its_bare_counterpart_compute_the_same_tokens(tmp_path: Path) -> None:
    """Equal prompts are not padded, and bare torch has the arithmetic of the update: FLOPs over seconds say so."""
    contestant = learner.Learner(write_reward_model(tmp_path / "model"), "equal", 1, "cpu", "float32", samples=2)
    found = contestant.run(0)
    assert found["computed tokens a token"] == 1.0
    flops = found["bare GFLOP/s"] / found["bare"]  # a token, in 1e9
    hidden, inner, layers, vocabulary, share = 256, 1024, 4, 8192, 48 / 176
    body, head = layers * (4 * hidden * hidden + 2 * hidden * inner), hidden * vocabulary * share
    attention = layers * hidden * 176 * 7 / 6  # 7 products of the causal half
    assert flops == pytest.approx(6 * (2 * body + head + 2 * attention) / 1e9, rel=0.02)
