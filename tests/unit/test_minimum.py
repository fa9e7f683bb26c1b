"""Log-probs, entropies and gradients where the tokens that end a turn were left out of the softmax at its start.

The oracle is transformers' own forward pass of each row, with the ends at -inf, position by position, in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

import rayrlhf.models.logprobs
from rayrlhf.config_rl import GRPOConfig, PPOConfig, RLConfig
from rayrlhf.data.rows import Row
from rayrlhf.models.batching import TokenBatch, collate, token_batches
from rayrlhf.models.logprobs import token_logprobs, token_logprobs_and_entropy
from rayrlhf.trajectory import Minimum, Sampling, Trajectory
from tests.tiny import (
    EOS,
    PAD,
    TEMPERATURE,
    VOCABULARY,
    difference,
    gradient,
    random_trajectories,
    recorded_gradients,
    tiny_models,
    trainer_of,
    with_sgd,
)

ENDS = (EOS, 17, 30)
TURN = [5, 6, 7, 8, 30]
"""A turn of four tokens and an end."""


def barred_one_by_one(trajectory: Trajectory) -> list[bool]:
    """Of each token that the policy wrote, whether it could not have been an end: counted with a counter."""
    assert trajectory.minimum
    found, place = [], 0
    for i, token in enumerate(trajectory.response_ids.tolist()):
        if trajectory.written is not None and not trajectory.written[i]:
            continue
        found.append(place < trajectory.minimum.tokens)
        place = 0 if token in trajectory.minimum.ends else place + 1
    return found


def trajectories() -> list[Trajectory]:
    """Three answers to one prompt, one of which is shorter than its minimum, and two trajectories in turns."""
    prompt = np.array([3, 4, 9, 12])

    def make(ids: list[int], tokens: int, written: list[bool] | None = None) -> Trajectory:
        wrote = np.array(written) if written else None
        own = len(ids) if wrote is None else int(wrote.sum())
        return Trajectory(
            "p", 0, 0, prompt, np.array(ids), np.zeros(own, np.float32), np.zeros(own, np.int64), "eos",
            {"reward": 1.0}, np.zeros(own, np.float32), written=wrote, minimum=Minimum(tokens, ENDS),
        )  # fmt: skip

    observed = [40, 41]
    return [
        make([5, 6, 7, 8, 9, 10, EOS], 4),
        make([11, 12, 13, 14, 17], 2),
        make([20, 21, 22], 5),
        # An observation between two turns, and none.
        make([*TURN, *observed, *TURN], 3, [True] * 5 + [False] * 2 + [True] * 5),
        make([*TURN, *TURN, 9, 10], 4, [True] * 12),
    ]


def oracle(policy: PreTrainedModel, found: Sequence[Trajectory], temperature: float) -> tuple[Tensor, Tensor]:
    """[N] float64 log-probs, with gradient, and entropies of all tokens that the policy wrote."""
    logprobs, entropies = [], []
    for t in found:
        logits = policy(torch.from_numpy(t.token_ids)[None]).logits[0].double() / temperature
        wrote = np.ones(len(t.response_ids), np.bool_) if t.written is None else t.written
        places = len(t.prompt_ids) + np.flatnonzero(wrote)
        for place, barred in zip(places, barred_one_by_one(t), strict=True):
            left = [i for i in range(VOCABULARY) if not (barred and i in ENDS)]
            own = logits[place - 1, left].log_softmax(-1)
            logprobs.append(own[left.index(int(t.token_ids[place]))])
            entropies.append(-(own.exp() * own).sum())
    return torch.stack(logprobs), torch.stack(entropies)


@given(written=st.lists(st.integers(0, 5), max_size=40), tokens=st.integers(1, 6), ends=st.sets(st.integers(0, 5)))
def test_the_start_of_a_turn_is_found_by_the_ends(written: list[int], tokens: int, ends: set[int]) -> None:
    expected, place = [], 0
    for token in written:
        expected.append(place < tokens)
        place = 0 if token in ends else place + 1
    assert Minimum(tokens, tuple(ends)).holds(np.array(written, np.int64)).tolist() == expected


def test_a_row_has_what_could_not_be_drawn() -> None:
    for trajectory in trajectories():
        expected = [[i, end] for i, barred in enumerate(barred_one_by_one(trajectory)) if barred for end in ENDS]
        assert Row.of(trajectory).barred.tolist() == expected
    free = replace(trajectories()[0], minimum=None)
    assert Row.of(free).barred.shape == (0, 2) and collate([Row.of(free)], PAD).barred.shape == (0, 2)
    assert Sampling(1.0, 9, EOS, (17, 30)).minimum is None
    assert Sampling(1.0, 9, EOS, (30, 17, EOS), min_tokens=3).minimum == Minimum(3, ENDS)


@pytest.mark.parametrize("limit", [2**25, 4 * VOCABULARY])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("max_tokens", [1, 4096])
def test_logprobs_entropies_and_gradients_are_of_the_softmax_without_the_ends(
    packed: bool, max_tokens: int, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packed and padded, in one batch and in many, with logits in one chunk and in chunks of four."""
    monkeypatch.setattr(rayrlhf.models.logprobs, "LOGITS", limit)
    policy, _ = tiny_models()
    plain, found = copy.deepcopy(policy), trajectories()
    expected, entropies = oracle(plain, found, TEMPERATURE)
    expected.sum().backward()

    def batches() -> list[tuple[list[int], TokenBatch]]:
        return list(token_batches([Row.of(t) for t in found], max_tokens, PAD, "cpu", packed=packed))

    ours: dict[int, tuple[Tensor, Tensor]] = {}
    for indices, batch in batches():
        logprobs = token_logprobs(policy, batch, TEMPERATURE)
        logprobs.sum().backward()
        measured = token_logprobs_and_entropy(policy, batch, TEMPERATURE)
        torch.testing.assert_close(measured.logprobs, logprobs.detach(), rtol=0, atol=2e-6)
        ours |= zip(
            indices,
            zip(logprobs.detach().split(batch.counts), measured.entropy.split(batch.counts), strict=True),
            strict=True,
        )
    for i, theirs in enumerate((expected.detach(), entropies.detach())):
        own = torch.cat([ours[row][i] for row in range(len(found))]).double()
        torch.testing.assert_close(own, theirs, rtol=1e-5, atol=1e-5)
    assert difference(gradient(policy.parameters()), gradient(plain.parameters())) < 1e-5
    # And the ends matter here, or this test shows nothing.
    free = oracle(plain, [replace(t, minimum=Minimum(0, ENDS)) for t in found], TEMPERATURE)
    assert all(float((a - b).detach().abs().mean()) > 0.01 for a, b in zip(free, (expected, entropies), strict=True))


def test_an_end_that_was_barred_has_probability_zero_and_no_gradient() -> None:
    policy, _ = tiny_models()
    row = replace(Row.completion([3, 4], [5, EOS]), barred=np.array([[1, EOS], [1, 30]]))
    logprobs = token_logprobs(policy, collate([row], PAD))
    assert float(logprobs[0].detach()) > -20 and float(logprobs[1].detach().exp()) == 0.0
    logprobs[1].backward()
    assert all(bool(p.grad.isfinite().all()) for p in policy.parameters() if p.grad is not None)


@pytest.mark.parametrize("settings", [PPOConfig(epochs=1), GRPOConfig(samples_per_prompt=2, reward_clip=1.0)])
def test_a_step_learns_from_the_restricted_distribution(settings: RLConfig) -> None:
    """Metrics and gradient: those of the loss written out with the oracle's log-probs."""
    policy, value_model = tiny_models()
    critic = value_model if settings.critic else None
    found = [replace(t, minimum=Minimum(3, ENDS)) for t in random_trajectories([(4, 7), (3, 9), (5, 8), (2, 6)], 3)]
    for i, t in enumerate(found):
        t.response_ids[np.isin(t.response_ids, ENDS[1:])] = 18  # one turn each, which no end begins
        t.response_ids[:3] = 20 + i
        t.prompt_id = f"p{i // 2}"
    plain = copy.deepcopy(policy)
    expected, entropies = oracle(plain, found, TEMPERATURE)
    counts = [t.written_tokens for t in found]
    trainer = with_sgd(trainer_of(policy, critic, settings.model_copy(update={"temperature": TEMPERATURE})))
    experience, metrics = trainer.make_experience(found)
    old = torch.cat([each.fixed.old_logprobs for each in experience])
    torch.testing.assert_close(old.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    reference = torch.cat([torch.from_numpy(t.ref_logprobs) for t in found if t.ref_logprobs is not None])
    log_ratio = expected.detach() - reference.double()
    assert metrics["rl/entropy"] == pytest.approx(float(entropies.detach().mean()), rel=1e-5)
    assert metrics["rl/kl"] == pytest.approx(float(log_ratio.sum()) / len(found), rel=1e-4)
    assert metrics["rl/kl_k3"] == pytest.approx(
        float((torch.expm1(-log_ratio) + log_ratio).sum()) / len(found), rel=1e-4
    )

    gradients, _ = recorded_gradients(trainer)
    step = trainer.step(found, 0)
    assert step["rl/first_ratio_off_one"] < 1e-6
    advantages = torch.cat([each.fixed.advantages for each in experience]).double()
    loss = -advantages * (expected - expected.detach()).exp()
    if settings.kl.estimator == "k3":
        d = expected - reference.double()
        loss = loss + settings.kl.coefficient * (torch.expm1(-d) + d)
    if settings.loss_mean == "response":
        total = torch.stack([each.mean() for each in loss.split(counts)]).mean()
    else:
        total = loss.mean()
    total.backward()
    expected_gradient = gradient(plain.parameters())
    expected_gradient *= min(1.0, settings.optimizer.max_grad_norm / float(expected_gradient.norm()))
    assert difference(gradients[0], expected_gradient) < 1e-4
