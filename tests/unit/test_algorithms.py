"""The algorithms without a critic: advantages by hand, updates that depend on nothing but the batch, and learning."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rayrlhf.algorithms.experience import Groups, Sampled
from rayrlhf.algorithms.registry import ALGORITHMS
from rayrlhf.algorithms.trainer import Trainer
from rayrlhf.config_file import parse_config
from rayrlhf.config_rl import GRPOConfig, KLConfig, PPOConfig, ReinforcePPConfig, RLConfig, RLOOConfig
from rayrlhf.errors import UserError
from rayrlhf.sections import OptimizerConfig
from rayrlhf.trajectory import Trajectory
from tests.tiny import (
    MAX_RESPONSE,
    TEMPERATURE,
    difference,
    flat,
    random_trajectories,
    recorded_gradients,
    sample_of,
    tiny_models,
    trainer_of,
    with_sgd,
)

PROMPTS = ["a", "b", "a", "b", "b", "c"]
SCORES = [1.0, -2.0, 4.0, 0.5, 3.0, 7.0]
GROUPS = [(0, 2), (1, 3, 4), (5,)]

WITHOUT_CRITIC: dict[str, RLConfig] = {
    "grpo": GRPOConfig(samples_per_prompt=2),
    "dr_grpo": GRPOConfig(samples_per_prompt=2, scale_by_std=False, loss_mean="constant", kl=KLConfig(coefficient=0.0)),
    "dapo": GRPOConfig(samples_per_prompt=2, clip_range_high=0.28, loss_mean="token", overlong_tokens=8),
    "gspo": GRPOConfig(samples_per_prompt=2, ratio="sequence", clip_range=3e-4, clip_range_high=4e-4),
    "cispo": GRPOConfig(samples_per_prompt=2, clip="weight", loss_mean="token", kl=KLConfig(estimator="k2")),
    "rloo": RLOOConfig(samples_per_prompt=2),
    "reinforce_pp": ReinforcePPConfig(),
    "reinforce_pp with a baseline": ReinforcePPConfig(samples_per_prompt=2, baseline=True),
}
each_algorithm = pytest.mark.parametrize("config", WITHOUT_CRITIC.values(), ids=WITHOUT_CRITIC)


def alone(values: Tensor) -> Tensor:
    """The sum over the ranks of a world of one."""
    return values


def sampled(lengths: Sequence[int], scores: Sequence[float], kl: float = 0.0) -> Sampled:
    """Responses of these lengths; each token's log-prob is `kl` above the reference's."""
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    logprobs = torch.where(mask, -1.0, 0.0)
    reference = torch.where(mask, logprobs - kl, 0.0)
    ended = torch.ones(len(lengths), dtype=torch.bool)
    return Sampled(torch.tensor(scores), ended, mask, logprobs, None, reference, logprobs, torch.zeros(()))


def advantages_of(config: RLConfig, lengths: Sequence[int], beta: float = 0.0, kl: float = 0.0) -> Tensor:
    """[B, R] of the six responses of `PROMPTS`."""
    batch = sampled(lengths, SCORES, kl)
    groups = Groups.of(PROMPTS, range(6), "cpu", alone)
    found, returns = ALGORITHMS[config.algorithm](config).advantages(batch, batch.scores, groups, beta, alone)
    assert returns is None and torch.equal(found, torch.where(batch.mask, found, 0.0))
    return found


def of_each(rule: Callable[[list[float], int], float], values: Sequence[float] = tuple(SCORES)) -> list[float]:
    """`rule(the values of a response's group, its place in the group)` for each of the six responses."""
    found = {i: rule([values[j] for j in group], place) for group in GROUPS for place, i in enumerate(group)}
    return [found[i] for i in range(6)]


def test_grpo_standardises_within_the_group() -> None:
    """A response without another one has nothing to be better than."""

    def standardised(group: list[float], place: int) -> float:
        return 0.0 if len(group) == 1 else (group[place] - statistics.mean(group)) / statistics.stdev(group)

    found = advantages_of(GRPOConfig(), lengths=[3, 1, 2, 4, 2, 1])
    assert found[:, 0].tolist() == pytest.approx(of_each(standardised), abs=1e-5)
    assert all(len(set(row[:n].tolist())) == 1 for row, n in zip(found, [3, 1, 2, 4, 2, 1], strict=True))
    plain = advantages_of(GRPOConfig(scale_by_std=False), lengths=[3, 1, 2, 4, 2, 1])
    assert plain[:, 0].tolist() == pytest.approx(of_each(lambda group, place: group[place] - statistics.mean(group)))


def test_rloo_leaves_one_out_after_the_penalty() -> None:
    """The penalty, 0.1 a token here, counts for the response and for the others' mean."""
    lengths = [3, 1, 2, 4, 2, 1]

    def left_out(group: list[float], place: int) -> float:
        others = group[:place] + group[place + 1 :]
        return group[place] - statistics.mean(others) if others else 0.0

    penalised = [score - 0.1 * length for score, length in zip(SCORES, lengths, strict=True)]
    found = advantages_of(RLOOConfig(), lengths, beta=0.2, kl=0.5)
    assert found[:, 0].tolist() == pytest.approx(of_each(left_out, penalised), abs=1e-5)


@pytest.mark.parametrize("baseline", [False, True])
def test_reinforce_pp_whitens_the_rewards_to_come(baseline: bool) -> None:
    lengths = [3, 1, 2, 4, 2, 1]
    config = ReinforcePPConfig(baseline=baseline, samples_per_prompt=2)
    scores = of_each(lambda group, place: group[place] - (statistics.mean(group) if baseline else 0.0))
    to_come = [[score - 0.1 * (n - t) for t in range(n)] for score, n in zip(scores, lengths, strict=True)]
    every = [value for row in to_come for value in row]
    mean, std = statistics.mean(every), statistics.stdev(every)
    found = advantages_of(config, lengths, beta=0.2, kl=0.5)
    for row, expected in zip(found, to_come, strict=True):
        assert row[: len(expected)].tolist() == pytest.approx([(value - mean) / std for value in expected], abs=1e-5)


def test_equal_scores_teach_nothing() -> None:
    batch = sampled([2, 2, 2], [0.1, 0.1, 0.1])
    groups = Groups.of(["a", "a", "a"], range(3), "cpu", alone)
    assert groups.statistics(batch.scores).std.tolist() == [0.0] * 3
    for config in (GRPOConfig(), RLOOConfig()):
        found, _ = ALGORITHMS[config.algorithm](config).advantages(batch, batch.scores, groups, 0.0, alone)
        assert float(found.abs().max()) < 1e-6


@pytest.mark.parametrize("size", [3, 6, 7, 49])
def test_equal_scores_have_no_spread_whatever_rounding_makes_of_their_mean(size: int) -> None:
    for value in (0.1, 1 / 3, -0.7, 1e-3):
        group = Groups.of(["a"] * size, range(size), "cpu", alone).statistics(torch.full((size,), value))
        assert group.std.tolist() == [0.0] * size
        assert group.mean.tolist() == [float(torch.tensor(value))] * size


def test_a_group_is_whole_whichever_ranks_have_it() -> None:
    """Two ranks, group b on both of them; what each adds to the sum is computed beforehand."""
    scores, owned = torch.tensor(SCORES), ([0, 3, 5], [1, 2, 4])
    parts = [
        torch.zeros(6, dtype=torch.float64).index_copy(0, torch.tensor(own), scores[own].double()) for own in owned
    ]
    whole = Groups.of(PROMPTS, range(6), "cpu", alone).statistics(scores)
    for own in owned:
        groups = Groups.of(PROMPTS, own, "cpu", lambda values: parts[0] + parts[1])
        for ours, all_of_them in zip(groups.statistics(scores[own]), whole, strict=True):
            assert torch.equal(ours, all_of_them[own])


# ---- whole updates


LENGTHS = [(3, 5), (3, 2), (6, 9), (6, 4), (2, 1), (2, 7)]


def batch_of(count: int = 6, seed: int = 0) -> list[Trajectory]:
    """Two responses to each prompt."""
    made = random_trajectories(LENGTHS[:count], seed)
    for i, trajectory in enumerate(made):
        trajectory.prompt_id, trajectory.sample_index = f"p{i // 2}", i % 2
        trajectory.prompt_ids = made[i - i % 2].prompt_ids
    return made


def learner(config: RLConfig, **changes: Any) -> Trainer:
    """A trainer of a fresh policy, by plain gradient descent."""
    optimizer = OptimizerConfig(schedule="constant", max_grad_norm=1e9)
    changes = {"temperature": TEMPERATURE, "optimizer": optimizer, "epochs": 2} | changes
    policy, _ = tiny_models(hidden=16)
    return with_sgd(trainer_of(policy, None, config.model_copy(update=changes)), lr=0.05)


def outcome(trainer: Trainer, batch: Sequence[Trajectory]) -> tuple[list[Tensor], dict[str, float]]:
    gradients, _ = recorded_gradients(trainer)
    metrics = trainer.step(batch, 0)
    return gradients, metrics


@each_algorithm
def test_updates_depend_neither_on_micro_batches_nor_on_order(config: RLConfig) -> None:
    """Two epochs: the second one starts from another policy, so that ratios and clipping have a part."""
    expected, metrics = outcome(learner(config), batch_of())
    assert len(expected) == 2 and all(float(gradient.norm()) > 0 for gradient in expected)
    for trainer, batch in (
        (learner(config, micro_batch_tokens=1), batch_of()),
        (learner(config, micro_batch_tokens=20), batch_of()[::-1]),
    ):
        found, others = outcome(trainer, batch)
        assert all(difference(ours, theirs) < 1e-4 for ours, theirs in zip(found, expected, strict=True))
        assert others == pytest.approx(metrics, rel=1e-4, abs=1e-5)


@each_algorithm
def test_a_step_without_a_critic_starts_on_policy_and_measures_no_values(config: RLConfig) -> None:
    metrics = learner(config, epochs=1).step(batch_of(), 0)
    assert metrics["rl/first_ratio_off_one"] < 1e-5
    assert not [name for name in metrics if "value" in name or "variance" in name]
    assert metrics["rl/groups_without_spread"] == 0.0 and metrics["rl/updates"] == 1


@each_algorithm
def test_an_interrupted_step_continues_to_the_bit(config: RLConfig) -> None:
    policy, _ = tiny_models(hidden=16)
    config = config.model_copy(update={"optimizer": OptimizerConfig(lr=1e-3)})
    whole = trainer_of(copy.deepcopy(policy), None, config)
    whole.step(batch_of(), 0)
    state, weights = copy.deepcopy(whole.state_dict()), copy.deepcopy(whole.policy.model.state_dict())
    whole.step(batch_of(seed=1), 1)
    again = trainer_of(copy.deepcopy(policy), None, config)
    again.policy.model.load_state_dict(weights)
    again.load_state_dict(state)
    again.step(batch_of(seed=1), 1)
    assert torch.equal(flat(again.policy.model.parameters()), flat(whole.policy.model.parameters()))


def test_over_long_responses_are_punished_softly() -> None:
    """DAPO: nothing up to 12 of 20 tokens, then an eighth a token, 1 at the limit."""
    trainer = learner(GRPOConfig(samples_per_prompt=2, overlong_tokens=8))
    batch = sampled([1, 12, 13, 16, MAX_RESPONSE], [2.0] * 5)
    assert trainer._adjusted_scores(batch.scores, batch.mask).tolist() == pytest.approx([2.0, 2.0, 1.875, 1.5, 1.0])


def test_groups_without_spread_are_counted() -> None:
    batch = batch_of()
    for trajectory in batch[:2]:
        trajectory.rewards, trajectory.finish_reason = {"reward": 0.25}, "eos"
    metrics = learner(GRPOConfig(samples_per_prompt=2)).step(batch, 0)
    assert metrics["rl/groups_without_spread"] == pytest.approx(1 / 3)


@each_algorithm
def test_the_policy_learns_what_is_rewarded(config: RLConfig) -> None:
    """The more often token 5 stands in a response, the better it is. Sampling and learning take turns."""
    policy, _ = tiny_models(hidden=16)
    optimizer = OptimizerConfig(lr=1e-2, schedule="constant")
    changes = {"optimizer": optimizer, "missing_eos_reward": None, "temperature": 1.0, "epochs": 1}
    trainer = trainer_of(policy, None, config.model_copy(update=changes))
    generator = torch.Generator().manual_seed(0)
    means = []
    for step in range(15):
        batch = [sample_of(policy, f"p{i // 4}", i % 4, generator) for i in range(16)]
        means.append(trainer.step(batch, step)["rl/score/mean"])
    assert np.mean(means[-3:]) > np.mean(means[:3]) + 0.5, means


# ---- the section `rl`


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"algorithm": "grpo", "samples_per_prompt": 1}, "'rl.samples_per_prompt'"),
        ({"algorithm": "rloo", "samples_per_prompt": 1}, "'rl.samples_per_prompt'"),
        ({"algorithm": "reinforce_pp", "baseline": True}, "baseline needs samples_per_prompt of 2 or more"),
        ({"algorithm": "gpro"}, "key 'rl.algorithm': 'gpro' is none of ppo, grpo, rloo, reinforce_pp"),
        ({"algorithm": "grpo", "lam": 0.9}, "unknown key 'rl.lam'"),
        ({"algorithm": "grpo", "clip_rang": 0.9}, "unknown key 'rl.clip_rang'; did you mean 'clip_range'?"),
        ({"algorithm": "grpo", "ratio": "sequence", "clip": "weight"}, "take one"),
        ({"algorithm": "grpo", "kl": {"estimator": "k4"}}, "'rl.kl.estimator'"),
    ],
)
def test_bad_settings_are_one_line(tree: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as raised:
        parse_config({"name": "run", "rl": tree}, "run.yaml")
    assert said in str(raised.value) and "\n" not in str(raised.value)


def test_the_punished_length_is_a_part_of_the_longest() -> None:
    with pytest.raises(UserError, match=r"rl\.overlong_tokens \(49\) must not exceed data\.max_response_tokens \(48\)"):
        rl = {"algorithm": "grpo", "overlong_tokens": 49}
        parse_config({"name": "run", "data": {"max_response_tokens": 48}, "rl": rl}, "run.yaml")


def test_the_section_of_an_algorithm() -> None:
    config = parse_config({"name": "run", "rl": {"algorithm": "grpo", "optimizer": {"lr": 1e-6}}}, "run.yaml")
    assert isinstance(config.rl, GRPOConfig) and config.rl.optimizer.lr == 1e-6 and not config.rl.critic
    assert config.rl.samples_per_prompt == 8 and config.rl.kl == KLConfig(estimator="k3", coefficient=0.04)
    partly = parse_config({"name": "run", "rl": {"algorithm": "grpo", "kl": {"coefficient": 0.1}}}, "run.yaml")
    assert partly.rl.kl == KLConfig(estimator="k3", coefficient=0.1)
    again = parse_config(config.model_dump(mode="json"), "dumped")
    assert again == config
    assert isinstance(parse_config({"name": "run", "rl": {"lam": 0.9}}, "run.yaml").rl, PPOConfig)


def test_the_old_name_of_the_section_names_the_new_one() -> None:
    with pytest.raises(UserError, match="key 'ppo' is 'rl' now"):
        parse_config({"name": "run", "ppo": {"steps": 3}}, "run.yaml")
