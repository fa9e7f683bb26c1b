"""Schedules against torch's own, clipping and AdamW against their equations, and what a resume restores."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import lr_scheduler
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from rayrlhf.algorithms.optimizer import Optimizer
from rayrlhf.config import Config
from rayrlhf.config_file import parse_config
from rayrlhf.config_rl import PPOConfig
from rayrlhf.models.ranks import Ranks
from rayrlhf.sections import OptimizerConfig

PEAK = 0.5


def followed(schedule: str, warmup_fraction: float, steps: int) -> list[float]:
    """The learning rate of every step, as our optimiser uses it."""
    model = nn.Linear(2, 1)
    config = OptimizerConfig(lr=PEAK, schedule=schedule, warmup_fraction=warmup_fraction)  # type: ignore[arg-type]
    optimizer = Optimizer(model, config, steps)
    used = []
    for _ in range(steps):
        assert optimizer.lr == optimizer.adamw.param_groups[0]["lr"]
        used.append(optimizer.lr)
        model(torch.ones(2)).sum().backward()
        optimizer.step(Ranks(1))
    return used


def theirs(schedule: str, warmup: int, steps: int) -> list[float]:
    """torch's own schedulers, one behind the other."""
    optimizer = torch.optim.SGD(nn.Linear(2, 1).parameters(), lr=PEAK)
    rest = max(1, steps - warmup)
    decays: dict[str, Callable[[], Any]] = {
        "constant": lambda: lr_scheduler.ConstantLR(optimizer, factor=1.0),
        "linear": lambda: lr_scheduler.PolynomialLR(optimizer, total_iters=rest, power=1.0),
        "cosine": lambda: lr_scheduler.CosineAnnealingLR(optimizer, T_max=rest),
    }
    # The first warm-up step already learns: 1/(w + 1), 2/(w + 1), ... and the peak after w steps.
    start = lr_scheduler.LinearLR(optimizer, start_factor=1 / (warmup + 1), total_iters=max(1, warmup))
    whole: Any = lr_scheduler.SequentialLR(optimizer, [start, decays[schedule]()], milestones=[warmup])
    if not warmup:
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["initial_lr"] = PEAK
        whole = decays[schedule]()
    used = []
    for _ in range(steps):
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        whole.step()
    return used


@given(st.sampled_from(["constant", "linear", "cosine"]), st.sampled_from([0.0, 0.05, 0.3, 0.5]), st.integers(1, 40))
@settings(max_examples=40)
@pytest.mark.filterwarnings("ignore:The epoch parameter in")  # SequentialLR's own
def test_schedules_are_torchs(schedule: str, warmup_fraction: float, steps: int) -> None:
    expected = theirs(schedule, round(warmup_fraction * steps), steps)
    assert followed(schedule, warmup_fraction, steps) == pytest.approx(expected, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_without_warm_up_schedules_are_also_those_of_transformers(schedule: Literal["linear", "cosine"]) -> None:
    """From the peak, which the first step uses, to 0, which the step after the last would use."""
    other = {"linear": get_linear_schedule_with_warmup, "cosine": get_cosine_schedule_with_warmup}[schedule]
    optimizer = torch.optim.SGD(nn.Linear(2, 1).parameters(), lr=PEAK)
    expected, reference = [], other(optimizer, 0, 10)
    for _ in range(10):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        reference.step()
    assert followed(schedule, 0.0, 10) == pytest.approx(expected)
    assert expected[0] == PEAK and optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-12)


def two_parameters() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))


def give_gradients(model: nn.Module, scale: float) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator)
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize(("scale", "limit"), [(10.0, 1.0), (10.0, 0.3), (0.01, 1.0)])
def test_gradients_are_clipped_by_their_norm_over_all_parameters(scale: float, limit: float) -> None:
    model = two_parameters()
    optimizer = Optimizer(model, OptimizerConfig(max_grad_norm=limit), steps=1)
    given_gradients = give_gradients(model, scale)
    expected = sum(float((g.double() ** 2).sum()) for g in given_gradients) ** 0.5
    assert optimizer.clip(Ranks(1)) == pytest.approx(expected, rel=1e-5)  # reported as it was before
    factor = min(1.0, limit / expected)
    for parameter, before in zip(model.parameters(), given_gradients, strict=True):
        torch.testing.assert_close(parameter.grad, before * factor, rtol=1e-5, atol=1e-7)


@given(st.lists(st.floats(-3.0, 3.0), min_size=1, max_size=5), st.sampled_from([0.0, 0.1]))
@settings(max_examples=30)
def test_updates_are_adamws(gradients: list[float], weight_decay: float) -> None:
    """Loshchilov and Hutter 2019, algorithm 2, written out for one weight."""
    weight = nn.Parameter(torch.tensor([1.5]))
    model = nn.ParameterList([weight])
    beta1, beta2, eps = 0.9, 0.95, 1e-5
    config = OptimizerConfig(
        lr=0.1, betas=(beta1, beta2), eps=eps, weight_decay=weight_decay, schedule="constant", max_grad_norm=1e9
    )
    optimizer = Optimizer(model, config, len(gradients))
    x, m, v = 1.5, 0.0, 0.0
    for t, g in enumerate(gradients, start=1):
        weight.grad = torch.tensor([g])
        optimizer.step(Ranks(1))
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        x -= 0.1 * weight_decay * x + 0.1 * (m / (1 - beta1**t)) / ((v / (1 - beta2**t)) ** 0.5 + eps)
        assert float(weight.detach()) == pytest.approx(x, rel=1e-4, abs=1e-5)


def test_a_skipped_step_advances_the_schedule_and_nothing_else() -> None:
    model = two_parameters()
    optimizer = Optimizer(model, OptimizerConfig(lr=PEAK, weight_decay=0.1), steps=10)
    before = copy.deepcopy(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch complains of a schedule that is ahead of its optimiser
        optimizer.skip()
    assert optimizer.lr == pytest.approx(PEAK * 0.9)
    give_gradients(model, 1.0)
    optimizer.skip()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not optimizer.adamw.state and all(p.grad is None for p in model.parameters())


def test_a_restored_optimizer_goes_on_as_if_nothing_had_happened() -> None:
    config = OptimizerConfig(lr=PEAK, warmup_fraction=0.3, schedule="cosine")
    model = two_parameters()
    optimizer = Optimizer(model, config, steps=8)
    for scale in (1.0, 0.1, 3.0):
        give_gradients(model, scale)
        optimizer.step(Ranks(1))
    other_model = copy.deepcopy(model)
    other = Optimizer(other_model, config, steps=8)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for scale in (0.5, 2.0):
        assert other.lr == optimizer.lr
        for each, own in ((model, optimizer), (other_model, other)):
            give_gradients(each, scale)
            own.step(Ranks(1))
    for one, two in zip(model.parameters(), other_model.parameters(), strict=True):
        assert torch.equal(one, two)


def test_published_defaults() -> None:
    """What docs/implementation_details.md calls the defaults."""
    config: Config = parse_config({"name": "run"}, "test")
    rl = config.rl
    assert isinstance(rl, PPOConfig)
    assert (config.sft.epochs, config.reward_model.epochs, rl.epochs, rl.minibatches) == (1, 1, 4, 1)
    assert (rl.gamma, rl.lam, rl.temperature, rl.missing_eos_reward) == (1.0, 0.95, 0.7, -1.0)
    assert (rl.clip_range, rl.value_clip_range, rl.value_coefficient) == (0.2, 0.2, 0.1)
    assert (rl.whiten_advantages, rl.whiten_rewards, rl.critic_warmup_steps, rl.value_lr) == (True, False, 0, None)
    assert rl.optimizer == OptimizerConfig(
        lr=3e-6, betas=(0.9, 0.999), eps=1e-5, weight_decay=0.0, warmup_fraction=0.0, schedule="linear",
        max_grad_norm=1.0,
    )  # fmt: skip
    kl = {"coefficient": 0.05, "adaptive": False, "target": 6.0, "horizon": 10_000}
    assert rl.kl.model_dump() == {"estimator": "k1", **kl}
    assert config.evaluate.temperature == 0.01
