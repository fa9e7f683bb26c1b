"""Rewards, GAE, whitening and both losses: random ragged batches against loops in float64, with junk where masked."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rayrlhf.algorithms.advantages import generalized_advantages, kl_penalised_rewards, whiten
from rayrlhf.algorithms.losses import clipped_surrogate, value_loss

JUNK = st.sampled_from([float("nan"), float("inf"), float("-inf"), 1e30, -7.0])
FRACTION = st.floats(0.0, 1.0)
NUMBER = st.floats(-5.0, 5.0, allow_subnormal=False)


@dataclass
class Ragged:
    """Random numbers for responses of `lengths` tokens: rows, and the same padded on the right with junk."""

    lengths: list[int]
    seed: int
    junk: float

    @property
    def mask(self) -> Tensor:
        return torch.arange(max(self.lengths)) < torch.tensor(self.lengths)[:, None]

    def rows(self, stream: int) -> list[np.ndarray]:
        rng = np.random.default_rng([self.seed, stream])
        return [rng.normal(size=n) for n in self.lengths]

    def padded(self, stream: int) -> Tensor:
        out = torch.full(self.mask.shape, self.junk, dtype=torch.float64)
        out[self.mask] = torch.from_numpy(np.concatenate(self.rows(stream)))
        return out


RAGGED = st.builds(Ragged, st.lists(st.integers(1, 12), min_size=1, max_size=6), st.integers(0, 999), JUNK)


def alone(x: Tensor) -> Tensor:
    """All-reduce over one rank."""
    return x


def check_rows(found: Tensor, expected: list[list[float]] | list[np.ndarray], mask: Tensor) -> None:
    """Equal at the response tokens, and 0 in the padding whatever the junk was."""
    np.testing.assert_allclose(found[mask], np.concatenate(expected), rtol=1e-9, atol=1e-9)
    assert torch.all(found[~mask] == 0)


@given(RAGGED, FRACTION, FRACTION)
def test_gae_is_the_sum_over_all_later_deltas(batch: Ragged, gamma: float, lam: float) -> None:
    advantages, returns = generalized_advantages(batch.padded(0), batch.padded(1), batch.mask, gamma, lam)
    expected = []
    for r, v in zip(batch.rows(0), batch.rows(1), strict=True):
        deltas = [r[t] + gamma * (v[t + 1] if t + 1 < len(v) else 0.0) - v[t] for t in range(len(r))]
        expected.append([
            sum((gamma * lam) ** (later - t) * deltas[later] for later in range(t, len(r))) for t in range(len(r))
        ])  # fmt: skip
    check_rows(advantages, expected, batch.mask)
    check_rows(returns, [np.array(a) + v for a, v in zip(expected, batch.rows(1), strict=True)], batch.mask)


@given(RAGGED, FRACTION)
def test_lambda_one_gives_discounted_rewards_and_lambda_zero_one_step(batch: Ragged, gamma: float) -> None:
    """What GAE must come down to at its two ends, however wrong the values are."""
    monte_carlo = generalized_advantages(batch.padded(0), batch.padded(1), batch.mask, gamma, 1.0).returns
    rewards = batch.rows(0)
    to_go = [[sum(gamma**k * x for k, x in enumerate(r[t:])) for t in range(len(r))] for r in rewards]
    check_rows(monte_carlo, to_go, batch.mask)
    one_step = generalized_advantages(batch.padded(0), batch.padded(1), batch.mask, gamma, 0.0).returns
    bootstrapped = [r + gamma * np.append(v[1:], 0.0) for r, v in zip(rewards, batch.rows(1), strict=True)]
    check_rows(one_step, bootstrapped, batch.mask)


@given(RAGGED, FRACTION, FRACTION)
def test_a_row_does_not_depend_on_its_batch(batch: Ragged, gamma: float, lam: float) -> None:
    scores = torch.from_numpy(np.random.default_rng(batch.seed).normal(size=len(batch.lengths)))
    together = kl_penalised_rewards(scores, batch.padded(0), batch.padded(1), batch.mask, 0.3)
    advantages, _ = generalized_advantages(together, batch.padded(2), batch.mask, gamma, lam)
    for i, n in enumerate(batch.lengths):
        own = [batch.padded(stream)[i : i + 1, :n] for stream in range(3)]
        mask = batch.mask[i : i + 1, :n]
        rewards = kl_penalised_rewards(scores[i : i + 1], own[0], own[1], mask, 0.3)
        torch.testing.assert_close(together[i, :n], rewards[0], rtol=0, atol=0)
        apart = generalized_advantages(rewards, own[2], mask, gamma, lam).advantages
        torch.testing.assert_close(advantages[i, :n], apart[0], rtol=0, atol=0)


@given(RAGGED, st.floats(0.0, 2.0))
def test_rewards_are_the_penalty_everywhere_and_the_score_at_the_end(batch: Ragged, beta: float) -> None:
    scores = np.random.default_rng(batch.seed).normal(size=len(batch.lengths))
    expected = []
    for own, reference, score in zip(batch.rows(0), batch.rows(1), scores, strict=True):
        expected.append([-beta * (p - q) for p, q in zip(own, reference, strict=True)])
        expected[-1][-1] += score
    given_scores = torch.from_numpy(scores)
    found = kl_penalised_rewards(given_scores, batch.padded(0), batch.padded(1), batch.mask, beta)
    check_rows(found, expected, batch.mask)
    torch.testing.assert_close(given_scores, torch.from_numpy(scores), rtol=0, atol=0)  # not written to


@given(RAGGED, st.floats(0.01, 100.0), NUMBER)
def test_whitening_forgets_shift_and_scale(batch: Ragged, scale: float, shift: float) -> None:
    x, mask = batch.padded(0), batch.mask
    everything = np.concatenate(batch.rows(0))
    white = whiten(x, mask, alone)
    if len(everything) == 1:
        check_rows(white, [np.zeros(1)], mask)
        return
    std = everything.std(ddof=1)
    np.testing.assert_allclose(white[mask], (everything - everything.mean()) / np.sqrt(std**2 + 1e-8), rtol=1e-9)
    assert torch.all(white[~mask] == 0)
    # Padding on the left is the same to it.
    torch.testing.assert_close(whiten(x.flip(1), mask.flip(1), alone).flip(1), white, rtol=1e-9, atol=1e-9)
    moved = whiten(x * scale + shift, mask, alone)[mask]
    # Exactly, but for the 1e-8 that guards the variance.
    np.testing.assert_allclose(moved, white[mask], rtol=1e-8 * (1 + scale**-2) / std**2 + 1e-9, atol=1e-9)
    scaled = whiten(x, mask, alone, shift_mean=False)[mask]
    np.testing.assert_allclose(scaled, white[mask] + everything.mean(), rtol=1e-9, atol=1e-9)


@given(RAGGED, st.integers(0, 6))
def test_whitening_on_two_ranks_is_that_of_all_rows(batch: Ragged, cut: int) -> None:
    """Two ranks that add up each other's sums, a rank without rows included."""
    x, mask = batch.padded(0), batch.mask
    parts = [(x[:cut], mask[:cut]), (x[cut:], mask[cut:])]
    heard: list[list[Tensor]] = [[], []]
    for rank, part in enumerate(parts):  # first what each rank would say: count and sum, then the squares it has left
        count, total = float(mask.sum()), float(x[mask].sum())

        def reduce(own: Tensor, rank: int = rank, count: float = count, total: float = total) -> Tensor:
            heard[rank].append(own)
            return torch.tensor([count, total], dtype=torch.float64) if len(own) == 2 else own

        whiten(*part, reduce)
    found = []
    for part in parts:
        sums = iter([heard[0][k] + heard[1][k] for k in range(2)])
        found.append(whiten(*part, lambda own, sums=sums: next(sums)))  # type: ignore[misc]
    torch.testing.assert_close(torch.cat(found), whiten(x, mask, alone), rtol=1e-9, atol=1e-9)


@given(st.integers(1, 12), st.floats(-100.0, 100.0))
def test_equal_entries_whiten_to_zero(count: int, value: float) -> None:
    white = whiten(torch.full((1, count), value, dtype=torch.float64), torch.ones(1, count, dtype=torch.bool), alone)
    torch.testing.assert_close(white, torch.zeros_like(white), rtol=0, atol=1e-6)


TOKENS = st.lists(st.tuples(NUMBER, NUMBER, NUMBER), min_size=1, max_size=20)
CLIP = st.floats(0.01, 0.9)


@given(TOKENS, CLIP)
def test_policy_loss_is_the_papers_token_by_token(tokens: list[tuple[float, float, float]], clip: float) -> None:
    new, old, advantages = (torch.tensor(x, dtype=torch.float64) for x in zip(*tokens, strict=True))
    new.requires_grad_()
    found = clipped_surrogate(new, old, advantages, clip)
    losses = found.loss.tolist()
    found.loss.sum().backward()
    assert new.grad is not None
    for i, (p, q, advantage) in enumerate(tokens):
        ratio = math.exp(p - q)
        inside = min(max(ratio, 1 - clip), 1 + clip)
        surrogate = min(advantage * ratio, advantage * inside)  # what the paper maximises
        assert losses[i] == pytest.approx(-surrogate, rel=1e-9, abs=1e-12)
        assert float(found.ratio[i]) == pytest.approx(ratio, rel=1e-9)
        # Going further the way that already went too far is worth nothing; everything else has the full gradient.
        too_far = (advantage > 0 and ratio > 1 + clip) or (advantage < 0 and ratio < 1 - clip)
        if min(abs(ratio - 1 - clip), abs(ratio - 1 + clip)) > 1e-9:
            assert float(new.grad[i]) == pytest.approx(0.0 if too_far else -advantage * ratio, rel=1e-9, abs=1e-12)
            if abs(advantage) > 1e-9:
                assert bool(found.clipped[i]) is too_far
    assert not found.ratio.requires_grad and not found.clipped.requires_grad


@given(TOKENS, CLIP)
def test_value_loss_is_the_larger_half_square(tokens: list[tuple[float, float, float]], clip: float) -> None:
    new, old, targets = (torch.tensor(x, dtype=torch.float64) for x in zip(*tokens, strict=True))
    new.requires_grad_()
    found = value_loss(new, old, targets, clip)
    losses = found.loss.tolist()
    found.loss.sum().backward()
    assert new.grad is not None
    for i, (value, before, target) in enumerate(tokens):
        near = before + min(max(value - before, -clip), clip)
        plain, clipped = (value - target) ** 2, (near - target) ** 2
        assert losses[i] == pytest.approx(0.5 * max(plain, clipped), rel=1e-9, abs=1e-12)
        if abs(plain - clipped) > 1e-9:
            assert bool(found.clipped[i]) is (clipped > plain)
            assert float(new.grad[i]) == pytest.approx(0.0 if clipped > plain else value - target, rel=1e-9, abs=1e-9)
        elif abs(value - before) < clip:
            assert float(new.grad[i]) == pytest.approx(value - target, rel=1e-6, abs=1e-6)
