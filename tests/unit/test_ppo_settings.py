"""PPO's options that are numbers in an update, what its metrics mean, and what a resume restores."""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rayrlhf.algorithms.trainer import Trainer
from rayrlhf.config_rl import KLConfig, PPOConfig
from rayrlhf.sections import OptimizerConfig
from rayrlhf.trajectory import Trajectory
from tests.tiny import TEMPERATURE, critic_of, flat, random_trajectories, recorded_gradients, tiny_models, trainer_of

LENGTHS = [(3, 5), (7, 2), (4, 8), (2, 6), (9, 1), (5, 4)]


def learner(**changes: Any) -> Trainer:
    optimizer = OptimizerConfig(lr=1e-3, betas=(0.9, 0.999), eps=1e-5, max_grad_norm=1e9)
    settings: dict[str, Any] = {"epochs": 1, "temperature": TEMPERATURE, "optimizer": optimizer}
    config = PPOConfig(prompts_per_step=len(LENGTHS), **(settings | changes))
    policy, value_model = tiny_models()
    return trainer_of(policy, value_model, config)


def weights(rl: Trainer) -> tuple[Tensor, Tensor]:
    return flat(rl.policy.model.parameters()), flat(critic_of(rl).forward.model.parameters())


@pytest.mark.parametrize("value_lr", [None, 4e-3])
def test_the_value_model_has_a_learning_rate_of_its_own(value_lr: float | None) -> None:
    """Adam's first step moves every weight by lr g / (|g| + eps)."""
    rl = learner(value_lr=value_lr)
    before = weights(rl)
    gradients = recorded_gradients(rl)
    rl.step(random_trajectories(LENGTHS), 0)
    rates = (1e-3, value_lr or 1e-3)
    for start, end, (gradient,), lr in zip(before, weights(rl), gradients, rates, strict=True):
        torch.testing.assert_close(end - start, -lr * gradient / (gradient.abs() + 1e-5), rtol=1e-3, atol=1e-6)


def test_critic_warm_up_counts_in_the_schedule_and_warns_of_nothing() -> None:
    rl = learner(critic_warmup_steps=1, steps=4)
    before = weights(rl)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rl.step(random_trajectories(LENGTHS), 0)
    assert torch.equal(weights(rl)[0], before[0]) and not torch.equal(weights(rl)[1], before[1])
    assert rl.policy_optimizer.lr == critic_of(rl).optimizer.lr == pytest.approx(0.75e-3)


def test_the_learning_rate_falls_to_zero_over_all_updates_of_the_run() -> None:
    """Steps x epochs x mini-batches of them; what a step reports is the rate that its successor starts with."""
    rl = learner(steps=2, epochs=3, minibatches=2, value_lr=2e-3)
    batch = random_trajectories(LENGTHS)
    used: list[tuple[float, float]] = []
    for optimizer, place in ((rl.policy_optimizer, 0), (critic_of(rl).optimizer, 1)):
        optimizer.adamw.register_step_pre_hook(
            lambda adamw, *_, place=place: used.append((place, adamw.param_groups[0]["lr"]))
        )
    reported = [rl.step(batch, step)["rl/lr"] for step in range(2)]
    for place, peak in ((0, 1e-3), (1, 2e-3)):
        assert [lr for which, lr in used if which == place] == pytest.approx([peak * (1 - i / 12) for i in range(12)])
    assert reported == pytest.approx([0.5e-3, 0.0])


def kl_of(batch: list[Trajectory], rl: Trainer) -> float:
    """Mean over responses of the summed log ratio to the reference, by transformers' own forward pass of each row."""
    totals = []
    for t in batch:
        ids, p = torch.from_numpy(t.token_ids), len(t.prompt_ids)
        with torch.no_grad():
            logprobs = (rl.policy.model(ids[None]).logits[0, p - 1 : -1] / TEMPERATURE).log_softmax(-1).double()
        own = logprobs[torch.arange(len(ids) - p), ids[p:]].numpy()
        assert t.ref_logprobs is not None
        totals.append(float(np.sum(own - t.ref_logprobs)))
    return float(np.mean(totals))


def test_beta_follows_the_measured_kl_of_each_step() -> None:
    rl = learner(kl=KLConfig(coefficient=0.1, adaptive=True, target=6.0, horizon=100), steps=3)
    beta = 0.1
    for step in range(3):
        batch = random_trajectories(LENGTHS, seed=step)
        kl = kl_of(batch, rl)
        metrics = rl.step(batch, step)
        assert metrics["rl/kl"] == pytest.approx(kl, rel=1e-4)
        assert metrics["rl/kl_coefficient"] == pytest.approx(beta), "the step is penalised by the beta before it"
        beta *= 1.0 + float(np.clip(kl / 6.0 - 1.0, -0.2, 0.2)) * len(LENGTHS) / 100
        assert rl.kl.beta == pytest.approx(beta)
    assert abs(beta - 0.1) > 1e-3


def test_the_steered_beta_is_what_the_rewards_are_made_with() -> None:
    """An adaptive beta that has come to 0.3 learns what a fixed one of 0.3 learns."""
    steered, fixed = learner(kl=KLConfig(coefficient=0.1, adaptive=True)), learner(kl=KLConfig(coefficient=0.3))
    steered.kl.beta = 0.3
    before = weights(steered)
    for rl in (steered, fixed):
        rl.step(random_trajectories(LENGTHS), 0)
    for own, other, start in zip(weights(steered), weights(fixed), before, strict=True):
        assert torch.equal(own, other) and not torch.equal(own, start)


def test_a_resumed_learner_ends_with_the_weights_of_an_undisturbed_one() -> None:
    """Optimisers, schedules and an adaptive beta go through a file; bit for bit the same afterwards."""
    changes: dict[str, Any] = {
        "kl": KLConfig(coefficient=0.1, adaptive=True, horizon=100), "steps": 4, "epochs": 2, "minibatches": 2,
        "value_lr": 2e-3,
    }  # fmt: skip
    undisturbed = learner(**changes)
    for step in range(2):
        undisturbed.step(random_trajectories(LENGTHS, seed=step), step)
    file = io.BytesIO()
    torch.save(undisturbed.state_dict(), file)
    file.seek(0)
    resumed = learner(**changes)
    assert resumed.kl.beta != undisturbed.kl.beta
    resumed.policy.model.load_state_dict(copy.deepcopy(undisturbed.policy.model.state_dict()))
    critic_of(resumed).forward.model.load_state_dict(copy.deepcopy(critic_of(undisturbed).forward.model.state_dict()))
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.kl.beta == undisturbed.kl.beta
    for step in range(2, 4):
        expected = undisturbed.step(random_trajectories(LENGTHS, seed=step), step)
        assert resumed.step(random_trajectories(LENGTHS, seed=step), step) == expected
    for own, other in zip(weights(resumed), weights(undisturbed), strict=True):
        assert torch.equal(own, other)


@pytest.mark.parametrize("missing_eos_reward", [None, -1.0, 2.5])
def test_responses_without_eos_score_the_penalty_or_what_they_got(missing_eos_reward: float | None) -> None:
    batch = random_trajectories(LENGTHS)
    metrics = learner(missing_eos_reward=missing_eos_reward).step(batch, 0)
    given = [t.rewards["reward"] for t in batch]
    ended = [t.finish_reason == "eos" for t in batch]
    assert 0 < sum(ended) < len(ended)
    if missing_eos_reward is not None:
        given = [score if end else missing_eos_reward for score, end in zip(given, ended, strict=True)]
    assert metrics["rl/score/mean"] == pytest.approx(np.mean(given), abs=1e-6)
    assert metrics["rl/score/std"] == pytest.approx(np.std(given), abs=1e-5)


def test_metrics_are_what_their_names_say() -> None:
    """k3, entropy, approx-KL, losses, clip fractions and explained variance, by transformers and numpy."""
    settings: dict[str, Any] = {"gamma": 0.9, "clip_range": 0.01, "value_clip_range": 0.003}
    before, critic = tiny_models()
    batch = random_trajectories(LENGTHS)
    settings["optimizer"] = OptimizerConfig(lr=1e-3, eps=1e-5, max_grad_norm=1e9, schedule="constant")
    one, two = learner(epochs=1, **settings), learner(epochs=2, **settings)
    one.step(batch, 0)
    after, critic_after = one.policy.model, critic_of(one).forward.model  # what the second epoch starts from
    metrics = two.step(batch, 0)

    columns: dict[str, list[np.ndarray]] = {name: [] for name in ("k3", "entropy", "moved", "v", "v2", "ret")}
    for t in batch:
        ids, p = torch.from_numpy(t.token_ids), len(t.prompt_ids)
        places = torch.arange(len(ids) - p)
        with torch.no_grad():
            old, new = (
                (m(ids[None]).logits[0, p - 1 : -1].double() / TEMPERATURE).log_softmax(-1) for m in (before, after)
            )
            v, v2 = (
                m.score(m.model(ids[None]).last_hidden_state)[0, p - 1 : -1, 0].double().numpy()
                for m in (critic, critic_after)
            )
        own, later = (x[places, ids[p:]].numpy() for x in (old, new))
        assert t.ref_logprobs is not None
        reverse = t.ref_logprobs.astype(np.float64) - own
        columns["k3"].append(np.exp(reverse) - 1 - reverse)
        columns["entropy"].append(-(old.exp() * old).sum(-1).numpy())
        columns["moved"].append(later - own)
        reward = 0.05 * reverse
        reward[-1] += t.rewards["reward"] if t.finish_reason == "eos" else -1.0
        deltas = reward + 0.9 * np.append(v[1:], 0.0) - v
        gae = [sum((0.9 * 0.95) ** k * d for k, d in enumerate(deltas[i:])) for i in range(len(v))]
        columns["ret"].append(np.array(gae) + v)
        columns["v"].append(v)
        columns["v2"].append(v2)
    flat_columns = {name: np.concatenate(rows) for name, rows in columns.items()}
    returns, values, moved = flat_columns["ret"], flat_columns["v"], flat_columns["moved"]
    advantages = returns - values
    advantages = (advantages - advantages.mean()) / advantages.std(ddof=1)
    ratio = np.exp(moved)
    assert metrics["rl/kl_k3"] == pytest.approx(flat_columns["k3"].sum() / len(batch), rel=1e-3)
    assert metrics["rl/entropy"] == pytest.approx(flat_columns["entropy"].mean(), rel=1e-4)
    assert metrics["rl/explained_variance"] == pytest.approx(1 - (returns - values).var() / returns.var(), rel=1e-3)
    # Means over both epochs, the first of which is on policy.
    assert metrics["rl/approx_kl"] == pytest.approx(0.5 * (moved**2).mean() / 2, rel=1e-2)
    assert metrics["rl/approx_kl"] > 1e-7
    assert metrics["rl/ratio/mean"] == pytest.approx((1 + ratio.mean()) / 2, rel=1e-4)
    clipped = ((advantages > 0) & (ratio > 1.01)) | ((advantages < 0) & (ratio < 0.99))
    assert metrics["rl/clip_fraction"] == pytest.approx(clipped.mean() / 2) and 0 < clipped.mean() < 1
    near = values + np.clip(flat_columns["v2"] - values, -0.003, 0.003)
    value_clipped = (near - returns) ** 2 > (flat_columns["v2"] - returns) ** 2
    assert metrics["rl/value_clip_fraction"] == pytest.approx(value_clipped.mean() / 2)
    assert 0 < value_clipped.mean() < 1
    # The losses, with a clip range of its own for each.
    surrogate = np.maximum(-advantages * ratio, -advantages * np.clip(ratio, 0.99, 1.01)).mean()
    assert metrics["rl/policy_loss"] == pytest.approx((-advantages.mean() + surrogate) / 2, rel=1e-3)
    squares = np.maximum((near - returns) ** 2, (flat_columns["v2"] - returns) ** 2).mean()
    assert metrics["rl/value_loss"] == pytest.approx(0.25 * (((values - returns) ** 2).mean() + squares), rel=1e-4)
