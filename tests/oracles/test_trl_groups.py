"""GRPO, its successors and RLOO against TRL 1.12: advantages, losses and gradients of all weights.

TRL's own code runs, in a real `GRPOTrainer` or `RLOOTrainer`: old and reference log-probs, rewards, advantages, the
loss. Only its sampling is replaced, by fixed samples. Then both sides take up the same new weights, so far from the old
ones that many ratios are clipped, and compute the loss of these. TRL gets the responses in groups and computes them at
once, with prompts padded on the left; ours gets them interleaved, and once as a whole, once cut into micro-batches.

Three conventions differ, and are made the same here:

- TRL adds 1e-4 to a standard deviation where ours adds 1e-6: scores are in the hundreds.
- TRL multiplies k3 by the ratio to the old policy, which equation 3 of Shao et al. 2024 does not: it is told not to.
- `epsilon_high` of TRL's CISPO is the cap of the ratio itself, with no lower bound: ours is 1 + `clip_range_high`, and
  a `clip_range` of 1 is no bound.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import trl
from datasets import Dataset
from torch import Tensor
from transformers import OPTForCausalLM
from trl.rewards import get_soft_overlong_punishment
from trl.trainer.utils import split_tensor_dict

from rayrlhf.algorithms.losses import KL_ESTIMATORS
from rayrlhf.algorithms.trainer import MiniBatch
from rayrlhf.config_rl import GRPOConfig, KLConfig, RLConfig, RLOOConfig
from rayrlhf.data.rows import Row
from rayrlhf.models.loading import load_tokenizer, resolve_model
from rayrlhf.sections import OptimizerConfig
from rayrlhf.trajectory import FinishReason, Trajectory
from tests.tiny import (
    EOS,
    MAX_RESPONSE,
    TEMPERATURE,
    VOCABULARY,
    difference,
    forward_of,
    gradient,
    recorded_gradients,
    tiny_models,
    trainer_of,
    with_sgd,
)

PROMPTS, GROUP = (5, 2, 9), 4
LENGTHS = (3, 14, 6, 1, 9, 2, 20, 5, 4, 11, 7, 16)
"""tokens of the responses, one prompt's after the other's"""
ONE_EACH, ALL = 1, 4096  # limits of a micro-batch
Theirs = Callable[..., "Found"]


class Problem(NamedTuple):
    """Samples and scores, one prompt's after the other's, and three policies."""

    old: OPTForCausalLM
    reference: OPTForCausalLM
    new: OPTForCausalLM
    prompts: list[list[int]]
    responses: list[list[int]]
    scores: list[float]


class Found(NamedTuple):
    """What one side made of it."""

    advantages: Tensor  # [responses]
    loss: float
    gradient: Tensor  # [parameters]
    clipped: float = 0.0  # share of the tokens; ours only


@pytest.fixture(scope="module")
def given() -> Problem:
    """Groups whose scores have different means and spreads."""
    old, _ = tiny_models()

    def moved(by: float) -> OPTForCausalLM:
        policy = copy.deepcopy(old)
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter += by * torch.randn_like(parameter)
        return policy

    rng = np.random.default_rng(0)
    prompts, responses = ([rng.integers(3, VOCABULARY, n).tolist() for n in lengths] for lengths in (PROMPTS, LENGTHS))
    for response in responses[::2]:
        response[-1] = EOS
    scores = np.array([[0], [300], [-200]]) + np.array([[100], [200], [50]]) * rng.normal(size=(len(PROMPTS), GROUP))
    return Problem(old, moved(0.03), moved(0.01), prompts, responses, scores.flatten().tolist())


@pytest.fixture
def theirs(given: Problem, tmp_path: Path) -> Theirs:
    return partial(run_trl, given, tmp_path)


def run_trl(given: Problem, path: Path, name: str = "GRPO", micro_batches: int = 1, **changes: Any) -> Found:
    """TRL's trainer of this name, whose settings are `changes`."""
    arguments: dict[str, Any] = {
        "output_dir": str(path / "trl"),
        "per_device_train_batch_size": len(given.responses),
        "num_generations": GROUP,
        "num_iterations": 2,  # it keeps old log-probs only if a batch is used twice
        "max_completion_length": MAX_RESPONSE,
        "temperature": TEMPERATURE,
        "beta": 0.0,
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
    }
    policy = copy.deepcopy(given.old)
    policy.config._name_or_path = str(path / "reference")  # where TRL then loads its reference policy
    given.reference.save_pretrained(path / "reference")
    trainer = getattr(trl, f"{name}Trainer")(
        policy,
        reward_funcs=lambda **_: given.scores,
        args=getattr(trl, f"{name}Config")(**(arguments | changes)),
        train_dataset=Dataset.from_dict({"prompt": ["0"]}),
        processing_class=load_tokenizer(resolve_model("embedded:opt-tiny")),
    )
    trainer._tokenize_prompts = lambda prompts: ([given.prompts[int(prompt)] for prompt in prompts], None, {})
    trainer._generate_single_turn = lambda *_: (given.responses, None) if name == "GRPO" else given.responses
    trainer.current_gradient_accumulation_steps = micro_batches

    policy.train()
    batch = trainer._generate_and_score_completions([{"prompt": str(i // GROUP)} for i in range(len(LENGTHS))])
    policy.load_state_dict(given.new.state_dict())
    loss = torch.stack([trainer.compute_loss(policy, part) for part in split_tensor_dict(batch, micro_batches)]).sum()
    loss.backward()
    return Found(batch["advantages"], loss.item(), gradient(policy.parameters()))


def run_ours(given: Problem, config: RLConfig, micro_batch_tokens: int = ALL) -> Found:
    """`Trainer.update`, after the weights have moved since `Trainer.make_experience`."""
    policy = copy.deepcopy(given.old)
    rl = with_sgd(trainer_of(policy, None, config.model_copy(update={"micro_batch_tokens": micro_batch_tokens})))
    gradients, _ = recorded_gradients(rl)
    batch = trajectories(given)
    interleaved = np.arange(len(batch)).reshape(len(PROMPTS), GROUP).T.flatten()
    experience, _ = rl.make_experience([batch[i] for i in interleaved])
    policy.load_state_dict(given.new.state_dict())
    sums, _ = rl.update(experience, MiniBatch(sum(LENGTHS), len(LENGTHS)))
    advantages = torch.empty(len(batch))
    for i, each in zip(interleaved, experience, strict=True):
        advantages[i] = each.fixed.advantages[0]
        assert (each.fixed.advantages == advantages[i]).all()
    per_token = {name: float(sums[name]) / sum(LENGTHS) for name in ("policy_loss", "clipped")}
    return Found(advantages, per_token["policy_loss"], gradients[0], per_token["clipped"])


def trajectories(given: Problem) -> list[Trajectory]:
    """The same samples as our records."""
    references = forward_of(given.reference).row_logprobs(rows(given), TEMPERATURE)
    made = []
    for i, (reference, n) in enumerate(zip(references, LENGTHS, strict=True)):
        prompt, response = np.array(given.prompts[i // GROUP]), np.array(given.responses[i])
        unread, versions = np.zeros(n, np.float32), np.zeros(n, np.int64)  # only a metric reads a generator's log-probs
        ending: FinishReason = "eos" if response[-1] == EOS else "length"
        scored = {"reward": given.scores[i]}, reference.numpy()
        made.append(Trajectory(str(i // GROUP), i % GROUP, i, prompt, response, unread, versions, ending, *scored))
    return made


def rows(given: Problem) -> list[Row]:
    return [Row.completion(given.prompts[i // GROUP], response) for i, response in enumerate(given.responses)]


NO_KL = KLConfig(coefficient=0.0)
K2, K3 = KLConfig(estimator="k2", coefficient=0.5), KLConfig(estimator="k3", coefficient=0.5)


def settings(algorithm: Callable[..., RLConfig], kl: KLConfig = NO_KL, **changes: Any) -> RLConfig:
    optimizer = OptimizerConfig(max_grad_norm=1e9)  # gradients are compared before a step, but after the limit
    return algorithm(temperature=TEMPERATURE, optimizer=optimizer, missing_eos_reward=None, kl=kl, **changes)


grpo, rloo = partial(settings, GRPOConfig), partial(settings, RLOOConfig)
TRL_K3 = {"beta": 0.5, "use_bias_correction_kl": False}

CASES: dict[str, tuple[RLConfig, dict[str, Any]]] = {
    "GRPO": (grpo(), {"loss_type": "grpo"}),
    "GRPO with k3": (grpo(kl=K3), {"loss_type": "grpo", **TRL_K3}),
    "Dr. GRPO": (grpo(scale_by_std=False, loss_mean="constant"), {"loss_type": "dr_grpo", "scale_rewards": "none"}),
    "DAPO": (grpo(clip_range_high=0.28, loss_mean="token"), {"loss_type": "dapo", "epsilon_high": 0.28}),
    "DAPO with k3": (grpo(loss_mean="token", kl=K3), {"loss_type": "dapo", **TRL_K3}),
    "GSPO": (
        grpo(ratio="sequence", clip_range=0.01, clip_range_high=0.02),
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.01, "epsilon_high": 0.02},
    ),
    "CISPO": (
        grpo(clip="weight", clip_range=1.0, clip_range_high=0.1, loss_mean="token"),
        {"loss_type": "cispo", "epsilon_high": 1.1},
    ),
    "RLOO": (rloo(), {"name": "RLOO"}),
    "RLOO with k1": (
        rloo(kl=KLConfig(coefficient=10.0), reward_clip=150.0, clip_range_high=3.0),
        {"name": "RLOO", "beta": 10.0, "reward_clip_range": (-150.0, 150.0), "epsilon_high": 3.0},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_advantages_losses_and_gradients_agree(given: Problem, theirs: Theirs, case: str) -> None:
    config, changes = CASES[case]
    other = theirs(**changes)
    one_each, all_at_once = (run_ours(given, config, tokens) for tokens in (ONE_EACH, ALL))
    assert difference(one_each.gradient, all_at_once.gradient) < 1e-5
    for found in (one_each, all_at_once):
        assert 0.1 < found.clipped < 0.9
        assert difference(found.advantages, other.advantages) < 1e-5
        assert found.loss == pytest.approx(other.loss, rel=5e-5)
        assert difference(found.gradient, other.gradient) < 5e-5


WRONG: dict[str, list[dict[str, Any]]] = {
    "GRPO": [{"clip_range": 10.0}, {"loss_mean": "token"}],
    "GRPO with k3": [{"kl": NO_KL}, {"kl": K2}],
    "Dr. GRPO": [{"loss_mean": "token"}],
    "DAPO": [{"clip_range_high": None}, {"clip": "weight"}],
    "GSPO": [{"ratio": "token"}],
    "CISPO": [{"clip": "surrogate"}, {"clip_range": 0.1}],
    "RLOO": [{"loss_mean": "token"}],
    "RLOO with k1": [{"kl": NO_KL}, {"reward_clip": None}, {"clip_range_high": None}],
}


@pytest.mark.parametrize("case", WRONG)
def test_every_setting_matters(given: Problem, case: str) -> None:
    """The comparisons above can fail: any of these settings, wrong, is far outside their tolerance."""
    config, _ = CASES[case]
    found = run_ours(given, config).gradient
    for wrong in WRONG[case]:
        assert difference(run_ours(given, config.model_copy(update=wrong)).gradient, found) > 0.1, wrong


def test_a_mean_of_means_is_another_loss(given: Problem, theirs: Theirs) -> None:
    """TRL's `bnpo` is a mean over the tokens of a micro-batch: ours if there is only one of them."""
    found = run_ours(given, grpo(loss_mean="token"), ONE_EACH)
    assert difference(found.gradient, theirs(loss_type="bnpo").gradient) < 5e-5
    assert difference(found.gradient, theirs(loss_type="bnpo", micro_batches=4).gradient) > 0.1


def test_k3_has_its_sign_and_no_ratio(given: Problem, theirs: Theirs, monkeypatch: pytest.MonkeyPatch) -> None:
    found = run_ours(given, grpo(kl=K3))
    with_ratio = theirs(loss_type="grpo", beta=0.5, use_bias_correction_kl=True)
    assert difference(found.gradient, with_ratio.gradient) > 0.1
    monkeypatch.setitem(KL_ESTIMATORS, "k3", lambda d: torch.expm1(d) - d)
    wrong = run_ours(given, grpo(kl=K3))
    assert found.loss != pytest.approx(wrong.loss, rel=0.05)
    assert difference(found.gradient, wrong.gradient) > 0.1


@pytest.mark.parametrize("beta", [0.0, 10.0])
def test_advantages_one_group_at_a_time(given: Problem, theirs: Theirs, beta: float) -> None:
    """Written out with the standard library, and with a penalty in GRPO's rewards, which TRL does not have."""
    old, reference = (
        [logprobs.double().sum().item() for logprobs in forward_of(policy).row_logprobs(rows(given), TEMPERATURE)]
        for policy in (given.old, given.reference)
    )
    rewards = [score - beta * (a - b) for score, a, b in zip(given.scores, old, reference, strict=True)]
    scaled, population, left_out = [], [], []
    for start in range(0, len(rewards), GROUP):
        group = rewards[start : start + GROUP]
        centred = [reward - statistics.mean(group) for reward in group]
        scaled += [c / statistics.stdev(group) for c in centred]
        population += [c / statistics.pstdev(group) for c in centred]
        left_out += [reward - statistics.mean(group[:i] + group[i + 1 :]) for i, reward in enumerate(group)]

    kl = KLConfig(coefficient=beta)
    found = run_ours(given, grpo(kl=kl)).advantages
    assert difference(found, torch.tensor(scaled)) < 1e-5
    assert difference(found, torch.tensor(population)) > 0.1
    assert difference(found, theirs(scale_rewards="batch").advantages) > 0.1
    assert difference(run_ours(given, rloo(kl=kl)).advantages, torch.tensor(left_out)) < 1e-5


@pytest.mark.parametrize("overlong_tokens", [1, 7, MAX_RESPONSE])
def test_soft_overlong_punishment(given: Problem, overlong_tokens: int) -> None:
    lengths = torch.arange(1, MAX_RESPONSE + 1)
    mask = torch.arange(MAX_RESPONSE) < lengths[:, None]
    scores = torch.linspace(-1.0, 1.0, len(lengths))
    adjusted = trainer_of(copy.deepcopy(given.old), None, grpo(overlong_tokens=overlong_tokens))._adjusted_scores(
        scores, mask
    )
    punish = get_soft_overlong_punishment(MAX_RESPONSE, overlong_tokens)
    punishment = torch.tensor(punish(completion_ids=[[0] * n for n in lengths.tolist()]))
    assert -1.0 == punishment.min() < punishment.max() <= 0.0
    torch.testing.assert_close(adjusted, scores + punishment, rtol=0, atol=1e-6)
