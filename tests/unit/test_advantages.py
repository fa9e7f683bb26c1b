"""Rewards, GAE and whitening against definitions written out in numpy float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rayrlhf.algorithms.advantages import generalized_advantages, kl_penalised_rewards, whiten


def ragged(lengths: list[int], seed: int = 0) -> tuple[list[np.ndarray], list[np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=n) for n in lengths], [rng.normal(size=n) for n in lengths]


def padded(rows: list[np.ndarray], junk: float = float("nan")) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(len(row) for row in rows)
    out = torch.full((len(rows), width), junk, dtype=torch.float64)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        out[i, : len(row)] = torch.from_numpy(row)
        mask[i, : len(row)] = True
    return out, mask


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.99, 0.0)])
def test_gae_is_the_discounted_sum_of_deltas(gamma: float, lam: float) -> None:
    rewards, values = ragged([5, 1, 3])
    reward_rows, mask = padded(rewards)
    value_rows, _ = padded(values)
    advantages, returns = generalized_advantages(reward_rows, value_rows, mask, gamma, lam)
    for i, (r, v) in enumerate(zip(rewards, values, strict=True)):
        deltas = r + gamma * np.append(v[1:], 0.0) - v
        expected = [sum((gamma * lam) ** k * d for k, d in enumerate(deltas[t:])) for t in range(len(r))]
        np.testing.assert_allclose(advantages[i, : len(r)], expected, rtol=1e-12)
        np.testing.assert_allclose(returns[i, : len(r)], np.array(expected) + v, rtol=1e-12)
    assert torch.all(advantages[~mask] == 0)
    assert torch.all(returns[~mask] == 0)


def test_with_gamma_and_lambda_one_the_return_is_the_reward_to_go() -> None:
    rewards, values = ragged([4])
    reward_rows, mask = padded(rewards)
    _, returns = generalized_advantages(reward_rows, padded(values)[0], mask, 1.0, 1.0)
    np.testing.assert_allclose(returns[0], rewards[0][::-1].cumsum()[::-1], rtol=1e-12)


def test_score_sits_on_the_last_token_and_the_kl_penalty_on_every_token() -> None:
    logprobs, ref = ragged([3, 2])
    logprob_rows, mask = padded(logprobs)
    rewards = kl_penalised_rewards(torch.tensor([2.0, -1.0]).double(), logprob_rows, padded(ref)[0], mask, beta=0.1)
    np.testing.assert_allclose(rewards[0], -0.1 * (logprobs[0] - ref[0]) + [0, 0, 2.0], rtol=1e-12)
    np.testing.assert_allclose(rewards[1, :2], -0.1 * (logprobs[1] - ref[1]) + [0, -1.0], rtol=1e-12)
    assert rewards[1, 2] == 0  # padding holds NaN on the way in


def test_whitening_uses_masked_statistics_of_all_ranks() -> None:
    rows, _ = ragged([5, 2, 4])
    everything = np.concatenate(rows)
    expected = (everything - everything.mean()) / everything.std(ddof=1)
    x, mask = padded(rows)
    np.testing.assert_allclose(whiten(x, mask, lambda t: t)[mask], expected, rtol=1e-6)
    kept_mean = whiten(x, mask, lambda t: t, shift_mean=False)[mask]
    np.testing.assert_allclose(kept_mean, expected + everything.mean(), rtol=1e-6)

    # Two ranks, each with its own rows, that see each other's sums: the result is the same numbers.
    first, first_mask = padded(rows[:1])
    second, second_mask = padded(rows[1:])
    other = {
        2: torch.tensor([6.0, float(second[second_mask].sum())], dtype=torch.float64),
        1: torch.tensor([float(((second[second_mask] - everything.mean()) ** 2).sum())], dtype=torch.float64),
    }
    white = whiten(first, first_mask, lambda t: t + other[len(t)])
    np.testing.assert_allclose(white[first_mask], expected[:5], rtol=1e-6)


def test_equal_or_single_entries_whiten_to_zero() -> None:
    for rows in ([np.full(3, 0.7)], [np.array([4.2])]):
        x, mask = padded(rows)
        np.testing.assert_allclose(whiten(x, mask, lambda t: t), 0.0, atol=1e-6)
