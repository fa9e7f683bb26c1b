"""What a global batch's gradients may depend on: its trajectories, and nothing of how they are cut and dealt.

Every case is a whole `PPO.step` on real (tiny, random) models, with ragged lengths and settings drawn by hypothesis.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from rayrlhf.algorithms.experience import Experience
from rayrlhf.algorithms.trainer import Trainer
from rayrlhf.config_rl import KLConfig, PPOConfig
from rayrlhf.models.ranks import Ranks
from rayrlhf.sections import OptimizerConfig
from rayrlhf.trajectory import Trajectory
from tests.tiny import (
    PAD,
    TEMPERATURE,
    critic_of,
    difference,
    flat,
    gradient,
    random_trajectories,
    recorded_gradients,
    tiny_models,
    trainer_of,
    with_sgd,
)

WHOLE = 100_000
RELATIVE = 1e-5


@dataclass(frozen=True)
class Case:
    """A batch and how it is learned from; plain values, so that it can travel to other processes."""

    lengths: tuple[tuple[int, int], ...]
    """(prompt tokens, response tokens) of every trajectory"""
    seed: int
    settings: dict[str, Any]
    samples: int = 1
    """Trajectories that follow one another and have the first one's prompt."""
    normalized: dict[str, float] | None = None
    """Weights of the rewards that are normalised."""

    @property
    def trajectories(self) -> list[Trajectory]:
        made = random_trajectories(self.lengths, self.seed)
        for i, trajectory in enumerate(made):
            first = made[i - i % self.samples]
            trajectory.prompt_id, trajectory.prompt_ids = first.prompt_id, first.prompt_ids
        return made

    def changed(self, **settings: Any) -> Case:
        return replace(self, settings=self.settings | settings)


@dataclass
class Outcome:
    """What a learner did in one step; the gradients are those of its optimiser steps, one after the other."""

    policy_gradients: list[Tensor]
    value_gradients: list[Tensor]
    metrics: dict[str, float]
    weights: Tensor
    minibatches: list[list[tuple[int, ...]]]
    """token ids of this rank's rows"""


@st.composite
def cases(draw: st.DrawFn) -> Case:
    lengths = st.tuples(st.integers(1, 9), st.integers(1, 9))
    drawn = draw(st.lists(lengths, min_size=3, max_size=9))
    return Case(
        tuple(drawn),
        draw(st.integers(0, 10_000)),
        {
            "epochs": draw(st.integers(1, 2)),
            "minibatches": draw(st.integers(1, 3)),
            "micro_batch_tokens": draw(st.sampled_from([1, 20, 40, WHOLE])),
            "gamma": draw(st.sampled_from([1.0, 0.9])),
            "lam": draw(st.sampled_from([1.0, 0.95, 0.5])),
            "whiten_rewards": draw(st.booleans()),
            "max_grad_norm": draw(st.sampled_from([0.1, 1e9])),
        },
        draw(st.integers(1, 3)),
    )


def make(case: Case, ranks: Ranks | None = None) -> Trainer:
    changes = dict(case.settings)
    optimizer = OptimizerConfig(schedule="constant", max_grad_norm=changes.pop("max_grad_norm"))
    # A heavy KL penalty and a tight clip range: every term has a part in the gradients.
    config = PPOConfig(
        prompts_per_step=len(case.lengths), temperature=TEMPERATURE, optimizer=optimizer, clip_range=0.05,
        kl=KLConfig(coefficient=0.3), **changes,
    )  # fmt: skip
    policy, value_model = tiny_models(hidden=16)
    return with_sgd(trainer_of(policy, value_model, config, ranks, case.seed, case.normalized), lr=0.1)


def learn(
    case: Case,
    ranks: Ranks | None = None,
    batch: Sequence[Trajectory] | None = None,
    step: int = 0,
    pack_rows: bool = True,
) -> Outcome:
    rl = make(case, ranks)
    assert rl.policy.packed and critic_of(rl).forward.packed
    rl.policy.packed = pack_rows
    policy_gradients, value_gradients = recorded_gradients(rl)
    minibatches: list[list[tuple[int, ...]]] = []
    update = rl.update

    def recording(rows: Sequence[Experience], *rest: Any) -> Any:
        minibatches.append([tuple(e.row.ids.tolist()) for e in rows])
        return update(rows, *rest)

    rl.update = recording  # type: ignore[method-assign, assignment]
    metrics = rl.step(batch or case.trajectories, step)
    weights = torch.cat([flat(m.parameters()) for m in (rl.policy.model, critic_of(rl).forward.model)])
    return Outcome(policy_gradients, value_gradients, metrics, weights, minibatches)


def check_same(found: Outcome, expected: Outcome) -> None:
    assert expected.policy_gradients[0].norm() > 0 and expected.value_gradients[0].norm() > 0
    for own, other in (
        (found.policy_gradients, expected.policy_gradients),
        (found.value_gradients, expected.value_gradients),
    ):
        largest = 0.0
        for ours, theirs in zip(own, other, strict=True):
            # Later updates start from weights that the rounding of the earlier, perhaps far larger, gradients is in.
            largest = max(largest, float(theirs.norm()))
            assert (ours - theirs).norm() <= RELATIVE * largest
    assert found.metrics == pytest.approx(expected.metrics, rel=1e-4, abs=1e-5)


@given(cases(), st.integers(1, 150))
@settings(max_examples=15)
def test_gradients_do_not_depend_on_micro_batches(case: Case, micro_batch_tokens: int) -> None:
    whole = learn(case.changed(micro_batch_tokens=WHOLE))
    check_same(learn(case.changed(micro_batch_tokens=micro_batch_tokens)), whole)


@given(cases(), st.randoms(use_true_random=False))
@settings(max_examples=15)
def test_gradients_do_not_depend_on_the_order_of_trajectories(case: Case, random: Any) -> None:
    """With several mini-batches the order decides who is in which, so there is one here."""
    case = case.changed(minibatches=1)
    shuffled = case.trajectories
    random.shuffle(shuffled)
    check_same(learn(case, batch=shuffled), learn(case))


@given(cases(), st.integers(1, 4))
@settings(max_examples=15)
def test_gradients_do_not_depend_on_packing_and_sharing_prompts(case: Case, samples: int) -> None:
    case = replace(case, samples=samples)
    check_same(learn(case), learn(case, pack_rows=False))


@given(cases())
@settings(max_examples=6)
def test_the_first_minibatch_is_on_policy(case: Case) -> None:
    """Ratio 1 and approx-KL 0, whatever the micro-batches of the two passes over the same tokens are."""
    metrics = learn(case.changed(epochs=1, minibatches=1)).metrics
    assert metrics["rl/first_ratio_off_one"] < 1e-6
    assert metrics["rl/approx_kl"] < 1e-11
    assert metrics["rl/ratio/mean"] == pytest.approx(1.0, abs=1e-6)
    assert metrics["rl/clip_fraction"] == 0.0
    later = learn(case.changed(epochs=2, minibatches=2, max_grad_norm=1e9)).metrics
    assert later["rl/first_ratio_off_one"] < 1e-6
    assert later["rl/approx_kl"] > 1e-9  # the policy has moved by then


@given(cases())
@settings(max_examples=6)
def test_every_epoch_is_a_fresh_permutation_of_the_batch(case: Case) -> None:
    case = case.changed(epochs=4)
    count = case.settings["minibatches"]
    minibatches = learn(case).minibatches
    assert len(minibatches) == 4 * count
    everything = sorted(tuple(t.token_ids.tolist()) for t in case.trajectories)
    for start in range(0, len(minibatches), count):
        assert sorted(row for rows in minibatches[start : start + count] for row in rows) == everything
    assert max(map(len, minibatches)) - min(map(len, minibatches)) <= 1


def test_permutations_differ_between_epochs_and_steps_and_seeds() -> None:
    case = Case(tuple((3, n) for n in (1, 2, 3, 4, 5, 6, 7, 8)), 0, {"epochs": 3, "max_grad_norm": 1.0})
    outcomes = [learn(case), learn(case, step=1), learn(replace(case, seed=1), batch=case.trajectories)]
    orders = [tuple(order) for outcome in outcomes for order in outcome.minibatches]
    assert len(set(orders)) == len(orders) == 9
    assert learn(case).minibatches == outcomes[0].minibatches


# ---- padding side and packing


def left_padded(rows: Sequence[np.ndarray]) -> dict[str, Tensor]:
    """Model inputs as most frameworks have them: [B, T] padded on the left, with attention mask and position ids."""
    ids = [torch.from_numpy(row) for row in rows]
    mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True, padding_side="left")
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=PAD, padding_side="left"),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
    }


def packed(rows: Sequence[np.ndarray]) -> dict[str, Tensor]:
    """All rows behind one another in one [1, T] row; a token attends to the earlier ones of its own row."""
    owner = torch.cat([torch.full((len(row),), i) for i, row in enumerate(rows)])
    allowed = (owner[:, None] == owner[None, :]).tril()
    return {
        "input_ids": torch.from_numpy(np.concatenate(rows))[None],
        "attention_mask": allowed[None, None],
        "position_ids": torch.cat([torch.arange(len(row)) for row in rows])[None],
    }


def of_each_row(output: Tensor, inputs: dict[str, Tensor], rows: Sequence[np.ndarray]) -> list[Tensor]:
    """[T_i, ...] what the model says at the tokens of each row."""
    if len(output) == 1:
        return list(output[0].split([len(row) for row in rows]))
    return [own[-len(row) :] for own, row in zip(output, rows, strict=True)]


def written_out(
    policy: PreTrainedModel, value_model: PreTrainedModel, case: Case, layout: Callable[..., dict[str, Tensor]]
) -> None:
    """The first gradients of a batch: transformers' own models, float64 numpy, and a loop over responses."""
    batch, changes = case.trajectories, case.settings
    rows = [t.token_ids for t in batch]
    inputs = layout(rows)
    logits = of_each_row(policy(**inputs).logits / TEMPERATURE, inputs, rows)
    states = value_model.model(**inputs).last_hidden_state
    values = of_each_row(value_model.score(states)[..., 0], inputs, rows)
    chosen, predicted, rewards = [], [], []
    for t, own_logits, own_values in zip(batch, logits, values, strict=True):
        before = slice(len(t.prompt_ids) - 1, -1)
        picked = own_logits[before].log_softmax(-1)[range(len(t.response_ids)), t.response_ids]
        chosen.append(picked)
        predicted.append(own_values[before])
        assert t.ref_logprobs is not None
        reward = -0.3 * (picked.detach().numpy().astype(np.float64) - t.ref_logprobs)
        reward[-1] += t.rewards["reward"] if t.finish_reason == "eos" else -1.0
        rewards.append(reward)
    if changes["whiten_rewards"]:
        everything = np.concatenate(rewards)
        mean, std = everything.mean(), everything.std(ddof=1)
        rewards = [(r - mean) / std + mean for r in rewards]
    advantages, returns = [], []
    for reward, own in zip(rewards, predicted, strict=True):
        v = own.detach().numpy().astype(np.float64)
        deltas = reward + changes["gamma"] * np.append(v[1:], 0.0) - v
        decay = changes["gamma"] * changes["lam"]
        gae = np.array([sum(decay**k * d for k, d in enumerate(deltas[i:])) for i in range(len(v))])
        advantages.append(gae)
        returns.append(gae + v)
    flat_advantages = np.concatenate(advantages)
    white = torch.from_numpy((flat_advantages - flat_advantages.mean()) / flat_advantages.std(ddof=1)).float()
    target = torch.from_numpy(np.concatenate(returns)).float()
    tokens = len(flat_advantages)
    (-(white * torch.cat(chosen)).sum() / tokens).backward()
    (0.1 * 0.5 * (torch.cat(predicted) - target).square().sum() / tokens).backward()


@pytest.mark.parametrize("layout", [left_padded, packed])
def test_gradients_are_those_of_left_padded_and_of_packed_batches(layout: Callable[..., dict[str, Tensor]]) -> None:
    @given(cases())
    @settings(max_examples=15)
    def check(case: Case) -> None:
        case = case.changed(minibatches=1, epochs=1, max_grad_norm=1e9)
        ours = learn(case)
        policy, value_model = tiny_models(hidden=16)
        written_out(policy, value_model, case, layout)
        assert difference(ours.policy_gradients[0], gradient(policy.parameters())) < RELATIVE
        assert difference(ours.value_gradients[0], gradient(value_model.parameters())) < RELATIVE

    check()


# ---- two ranks


class Pair:
    """Two processes that learn as two ranks over gloo, case after case."""

    def __init__(self, directory: Path) -> None:
        context = mp.get_context("spawn")
        pipes = [context.Pipe() for _ in range(2)]
        self.ends = [own for own, _ in pipes]
        self.processes = [
            context.Process(target=serve, args=(rank, str(directory / "rendezvous"), theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process in self.processes:
            process.start()

    def learn(self, case: Case) -> list[Outcome]:
        for end in self.ends:
            end.send(case)
        found = []
        for end in self.ends:
            assert end.poll(timeout=200), "a rank has stopped"
            outcome = pickle.loads(end.recv_bytes())
            assert isinstance(outcome, Outcome), outcome
            found.append(outcome)
        return found

    def close(self) -> None:
        for process in self.processes:
            process.terminate()
            process.join(timeout=10)


def serve(rank: int, rendezvous: str, end: Connection) -> None:
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    while True:
        case = end.recv()
        try:
            outcome: Outcome | str = learn(case, Ranks(1))
        except Exception as error:
            outcome = repr(error)
        end.send_bytes(pickle.dumps(outcome))  # `send` would lend tensors out, which the other side has to outlive


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    pair = Pair(tmp_path_factory.mktemp("pair"))
    yield pair
    pair.close()


def test_two_ranks_do_what_one_does(pair: Pair) -> None:
    """Gradients, their clipping, metrics and weights; also where a mini-batch has no row on one of the ranks."""
    empty: list[bool] = []

    @given(cases())
    @settings(max_examples=15)
    def check(case: Case) -> None:
        alone, (first, second) = learn(case), pair.learn(case)
        for outcome in (first, second):
            check_same(outcome, alone)
        assert torch.equal(first.weights, second.weights)
        both = [one + other for one, other in zip(first.minibatches, second.minibatches, strict=True)]
        assert [sorted(rows) for rows in both] == [sorted(rows) for rows in alone.minibatches]
        empty.extend(not rows for outcome in (first, second) for rows in outcome.minibatches)

    check()
    assert any(empty) and not all(empty)


def test_two_ranks_normalise_over_the_whole_batch(pair: Pair) -> None:
    settings = {"epochs": 1, "minibatches": 2, "micro_batch_tokens": 40, "max_grad_norm": 1e9}
    plain = Case(((3, 2), (5, 4), (2, 6), (4, 4), (7, 3)), 3, settings)
    case = replace(plain, normalized={"reward": -2.0})
    alone, outcomes = learn(case), pair.learn(case)
    for outcome in outcomes:
        check_same(outcome, alone)
    assert difference(alone.policy_gradients[0], learn(plain).policy_gradients[0]) > 0.1
