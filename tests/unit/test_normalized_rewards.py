"""Rewards that are normalised over a batch: by hand, and what the trainer learns from and reports."""

from __future__ import annotations

import copy
import statistics
from typing import Any

import pytest
import torch

from rayrlhf.config_file import parse_config
from rayrlhf.config_rl import GRPOConfig, RLConfig, RLOOConfig
from rayrlhf.rewards.functions import learned_scores, scores
from rayrlhf.trajectory import Trajectory
from tests.tiny import flat, random_trajectories, tiny_models, trainer_of

RAW = {"model": [10.0, 30.0, 20.0, 40.0], "rule": [0.0, 0.0, 1.0, 0.0]}


def batch_of(**weights: float) -> list[Trajectory]:
    """Four responses with these rewards, weighted as scorers do it; the first and the last one have no EOS."""
    batch = random_trajectories([(3, 2), (3, 4), (2, 5), (4, 3)])
    for i, trajectory in enumerate(batch):
        trajectory.rewards = {name: weight * RAW[name][i] for name, weight in weights.items()}
        trajectory.prompt_id = f"p{i // 2}"
    assert [t.finish_reason for t in batch] == ["length", "eos", "eos", "length"]
    return batch


def standard(values: list[float]) -> list[float]:
    return [(value - statistics.mean(values)) / statistics.stdev(values) for value in values]


@pytest.mark.parametrize("weight", [1.0, 0.25, -3.0])
def test_mean_and_spread_go_before_the_weight_comes(weight: float) -> None:
    """10, 30, 20, 40: less 25, divided by sqrt((225 + 25 + 25 + 225) / 3) = 12.909944."""
    found = learned_scores(batch_of(model=weight), None, {"model": weight})
    assert found.tolist() == pytest.approx([weight * (s - 25) / 12.909944 for s in RAW["model"]], rel=1e-6)


def test_others_stay_and_a_missing_eos_replaces_the_sum() -> None:
    batch = batch_of(model=2.0, rule=5.0)
    z = [2.0 * value for value in standard(RAW["model"])]
    expected = [z[0], z[1], z[2] + 5.0, z[3]]
    assert learned_scores(batch, None, {"model": 2.0}).tolist() == pytest.approx(expected, rel=1e-6)
    cut = [-1.0, z[1], z[2] + 5.0, -1.0]  # those without EOS are in mean and standard deviation all the same
    assert learned_scores(batch, -1.0, {"model": 2.0}).tolist() == pytest.approx(cut, rel=1e-6)
    assert scores(batch, None).tolist() == [20.0, 60.0, 45.0, 80.0], "what evaluation and best-of-n sum up"


def test_no_weight_and_no_spread_are_zero() -> None:
    assert learned_scores(batch_of(model=0.0), None, {"model": 0.0}).tolist() == [0.0] * 4
    equal = batch_of(model=1.0)
    for trajectory in equal:
        trajectory.rewards = {"model": 0.1}  # the mean of 0.1, 0.1 and 0.1 is not 0.1 in float64
    for some in (equal[:3], equal[:1]):
        assert learned_scores(some, None, {"model": 1.0}).tolist() == [0.0] * len(some)


@pytest.mark.parametrize(
    "config", [GRPOConfig(samples_per_prompt=2, reward_clip=0.9), RLOOConfig(samples_per_prompt=2)]
)
def test_the_policy_learns_from_normalised_scores_and_the_metrics_show_plain_ones(config: RLConfig) -> None:
    """As from a batch whose rewards were normalised by hand; limits such as reward_clip hold for normalised scores."""
    batch = batch_of(model=-2.0)
    by_hand = copy.deepcopy(batch)
    for trajectory, value in zip(by_hand, standard(RAW["model"]), strict=True):
        trajectory.rewards = {"model": -2.0 * value}
    learned, expected = (trainer_of(tiny_models()[0], None, config, normalized=n) for n in ({"model": -2.0}, None))
    metrics, plain = learned.step(batch, 0), expected.step(by_hand, 0)
    ours, theirs = (flat(trainer.policy.model.parameters()) for trainer in (learned, expected))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7)
    assert not torch.equal(ours, flat(tiny_models()[0].parameters()))
    assert metrics["rl/reward/mean"] == pytest.approx(plain["rl/reward/mean"], abs=1e-5)
    assert metrics["rl/score/clip_fraction"] == plain["rl/score/clip_fraction"] == (0.5 if config.reward_clip else 0.0)
    shown = [-1.0, -60.0, -40.0, -1.0]
    assert metrics["rl/score/mean"] == pytest.approx(statistics.mean(shown))
    assert metrics["rl/score/std"] == pytest.approx(statistics.pstdev(shown))


def test_every_kind_of_reward_may_be_normalised() -> None:
    sections: list[dict[str, Any]] = [
        {"kind": "model"},
        {"kind": "model", "name": "given", "path": "some/model"},
        {"kind": "python", "name": "rule", "path": "mine.py:score"},
        {"kind": "http", "name": "style", "url": "http://127.0.0.1:1"},
        {"kind": "judge", "name": "judge", "url": "http://127.0.0.1:1", "model": "m", "rubric": "r"},
        {"kind": "environment"},
    ]
    tree = {"name": "run", "environment": {"path": "game.py:Game", "max_turns": 2}}
    config = parse_config(tree | {"rewards": [{**s, "normalize": True} for s in sections]}, "test")
    assert all(reward.normalize for reward in config.rewards)
    assert not any(r.normalize for r in parse_config(tree | {"rewards": sections}, "test").rewards)
