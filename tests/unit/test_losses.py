"""The two clipped losses against their definitions, branch by branch."""

from __future__ import annotations

import math

import pytest
import torch

from rayrlhf.algorithms.kl import KLController
from rayrlhf.algorithms.losses import clipped_surrogate, importance_weights, value_loss
from rayrlhf.config_rl import KLConfig


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "expected", "gradient", "clipped"),
    [
        (0.0, 2.0, -2.0, -2.0, False),  # ratio 1: the plain policy gradient
        (math.log(1.5), 2.0, -2.4, 0.0, True),  # a good token already likelier by more than 1 + eps: no more push
        (math.log(0.5), 2.0, -1.0, -1.0, False),  # a good token that became rarer is pulled back
        (math.log(0.5), -2.0, 1.6, 0.0, True),  # a bad token already rarer by more than 1 - eps
        (math.log(1.5), -2.0, 3.0, 3.0, False),  # a bad token that became likelier is pushed down in full
    ],
)
def test_policy_loss_branches(
    log_ratio: float, advantage: float, expected: float, gradient: float, clipped: bool
) -> None:
    old = torch.tensor([-1.3], dtype=torch.float64)
    logprobs = (old + log_ratio).requires_grad_()
    result = clipped_surrogate(logprobs, old, torch.tensor([advantage], dtype=torch.float64), clip_range=0.2)
    result.loss.sum().backward()
    assert result.loss.item() == pytest.approx(expected)
    assert logprobs.grad is not None
    assert logprobs.grad.item() == pytest.approx(gradient)
    assert result.ratio.item() == pytest.approx(math.exp(log_ratio))
    assert result.clipped.item() is clipped


@pytest.mark.parametrize(
    ("value", "old", "target", "expected"),
    [
        (0.5, 0.5, 1.0, 0.125),  # inside the clip range: plain half squared error
        (0.9, 0.5, 1.0, 0.5 * 0.3**2),  # moved 0.4 towards the target: scored as if moved only 0.2
        (0.1, 0.5, 1.0, 0.5 * 0.9**2),  # moved away: the larger, unclipped error counts
    ],
)
def test_value_loss_takes_the_larger_error(value: float, old: float, target: float, expected: float) -> None:
    values, old_values, returns = (torch.tensor([x], dtype=torch.float64) for x in (value, old, target))
    result = value_loss(values, old_values, returns, clip_range=0.2)
    assert result.loss.item() == pytest.approx(expected)


def test_adaptive_kl_moves_by_the_clipped_proportional_error() -> None:
    controller = KLController(KLConfig(coefficient=0.1, adaptive=True, target=6.0, horizon=10_000))
    controller.update(6.6, samples=512)  # 10 % over the target
    assert controller.beta == pytest.approx(0.1 * (1 + 0.1 * 512 / 10_000))
    before = controller.beta
    controller.update(60.0, samples=512)  # the error is clipped at +0.2
    assert controller.beta == pytest.approx(before * (1 + 0.2 * 512 / 10_000))
    before = controller.beta
    controller.update(0.0, samples=512)  # far below it: at -0.2
    assert controller.beta == pytest.approx(before * (1 - 0.2 * 512 / 10_000))
    fixed = KLController(KLConfig(coefficient=0.1))
    fixed.update(60.0, samples=512)
    assert fixed.beta == 0.1


def test_beta_stays_positive_whatever_the_batch() -> None:
    """More samples than five horizons, all without KL, would by the bare formula make beta 0 and then negative."""
    controller = KLController(KLConfig(coefficient=0.1, adaptive=True, horizon=100))
    for samples in (500, 600, 100_000):
        before = controller.beta
        controller.update(0.0, samples)
        assert controller.beta == pytest.approx(0.8 * before)


def test_importance_weights_are_ratios_cut_from_above() -> None:
    old = torch.log(torch.tensor([0.1, 0.5, 0.4, 0.2]))
    generator = torch.log(torch.tensor([0.4, 0.5, 0.25, 0.01]))
    torch.testing.assert_close(importance_weights(old, generator, 2.0), torch.tensor([0.25, 1.0, 1.6, 2.0]))
