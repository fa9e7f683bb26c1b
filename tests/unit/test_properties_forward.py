"""The one forward pass, and the SFT and reward-model gradients on top of it: no row knows of its batch."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import OPTForCausalLM, OPTForSequenceClassification

from rayrlhf.algorithms.ranked_pass import ranked_pass
from rayrlhf.algorithms.sft import predicted_tokens, summed_loss
from rayrlhf.data.comparisons import RankedAnswers
from rayrlhf.data.rows import Row
from rayrlhf.models.batching import TokenBatch, collate, micro_batches, pack
from rayrlhf.models.logprobs import sequence_scores, token_logprobs_and_entropy, token_values
from rayrlhf.models.ranks import Ranks
from rayrlhf.rewards.functions import RewardModelFunction
from tests.tiny import EOS, PAD, VOCABULARY, difference, forward_of, gradient, random_trajectories, tiny_models

EXAMPLES = settings(max_examples=20)
TEMPERATURES = st.floats(0.1, 3.0)
ROWS = st.builds(
    lambda lengths, seed: random_rows(lengths, seed),
    st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=6),
    st.integers(0, 999),
)


@cache
def models() -> tuple[OPTForCausalLM, OPTForSequenceClassification]:
    policy, scorer = tiny_models(hidden=16)
    scorer.config.reward_bias = 0.25
    return policy, scorer


def random_rows(lengths: list[tuple[int, int]], seed: int) -> list[Row]:
    return [Row.completion(t.prompt_ids, t.response_ids) for t in random_trajectories(lengths, seed)]


def with_junk(batch: TokenBatch, extra: int, seed: int) -> TokenBatch:
    """The same rows padded `extra` tokens further, with any ids in the padding, EOS and PAD included."""
    (count, old), width = batch.input_ids.shape, batch.input_ids.shape[1] + extra
    junk = torch.randint(0, VOCABULARY, (count, width), generator=torch.Generator().manual_seed(seed))
    real = torch.arange(old) <= (batch.ends % old)[:, None]
    junk[:, :old] = torch.where(real, batch.input_ids, junk[:, :old])
    states, ends = (index // old * width + index % old for index in (batch.states, batch.ends))
    return replace(batch, input_ids=junk, states=states, ends=ends)


@given(ROWS, TEMPERATURES, st.integers(0, 9), st.integers(0, 99))
@EXAMPLES
def test_a_row_does_not_depend_on_its_batch_or_on_what_pads_it(
    rows: list[Row], temperature: float, extra: int, seed: int
) -> None:
    policy, scorer = models()
    for batch in (with_junk(collate(rows, PAD), extra, seed), pack(rows)):
        with torch.no_grad():
            together = token_logprobs_and_entropy(policy, batch, temperature)
            values, scores = token_values(scorer, batch), sequence_scores(scorer, batch)
            columns = (together.logprobs, together.entropy, values)
            for i, (row, *found) in enumerate(zip(rows, *(c.split(batch.counts) for c in columns), strict=True)):
                alone = collate([row], PAD)
                own = token_logprobs_and_entropy(policy, alone, temperature)
                for ours, theirs in zip(found, (own.logprobs, own.entropy, token_values(scorer, alone)), strict=True):
                    # Dividing the logits magnifies their rounding errors.
                    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 + 1e-5 / temperature)
                torch.testing.assert_close(scores[i : i + 1], sequence_scores(scorer, alone), rtol=1e-5, atol=1e-5)


@given(ROWS, TEMPERATURES)
@EXAMPLES
def test_temperature_divides_the_logits(rows: list[Row], temperature: float) -> None:
    policy, _ = models()
    batch = collate(rows, PAD)
    with torch.no_grad():
        found = token_logprobs_and_entropy(policy, batch, temperature)
        expected, entropy = [], []
        for row in rows:
            ids = torch.from_numpy(row.ids)
            logits = policy(ids[None]).logits[0, :-1].double().numpy() / temperature
            for position in np.flatnonzero(row.mask):
                own = logits[position - 1]
                p = np.exp(own - own.max()) / np.exp(own - own.max()).sum()
                expected.append(np.log(p[row.ids[position]]))
                entropy.append(-np.sum(p * np.log(np.maximum(p, 1e-300))))
    np.testing.assert_allclose(found.logprobs, expected, rtol=1e-5, atol=1e-5 + 1e-5 / temperature)
    np.testing.assert_allclose(found.entropy, entropy, rtol=1e-4, atol=1e-4)


@given(ROWS, st.integers(1, 120), st.randoms(use_true_random=False))
@EXAMPLES
def test_rewards_do_not_depend_on_the_batch(rows: list[Row], micro_batch_tokens: int, random: Any) -> None:
    """The scorer's reward function: alone, and among others in any order and micro-batches."""
    _, scorer = models()
    batch = random_trajectories([(max(1, int((~r.mask).sum())), int(r.mask.sum())) for r in rows], seed=len(rows))

    def score(trajectories: list[Any], tokens: int) -> list[float]:
        return RewardModelFunction(forward_of(scorer, tokens))(trajectories)["reward_model"]

    order = list(range(len(batch)))
    random.shuffle(order)
    found = score([batch[i] for i in order], micro_batch_tokens)
    for i, reward in zip(order, found, strict=True):
        assert reward == pytest.approx(score([batch[i]], 1)[0], rel=1e-5, abs=1e-5)


def gradient_of(model: Any) -> Tensor:
    found = gradient(model.parameters())
    model.zero_grad(set_to_none=True)
    return found


@given(ROWS, st.integers(1, 120), st.randoms(use_true_random=False))
@EXAMPLES
def test_sft_gradients_do_not_depend_on_the_cut(rows: list[Row], micro_batch_tokens: int, random: Any) -> None:
    """Against transformers' own loss of each row by itself, weighted by its tokens."""
    policy, _ = models()
    tokens = predicted_tokens(rows)
    shuffled = random.sample(rows, len(rows))
    loss = summed_loss(forward_of(policy, micro_batch_tokens), shuffled, Ranks(1), scale=1 / tokens)
    ours = gradient_of(policy)
    expected = 0.0
    for row in rows:
        ids = torch.from_numpy(row.ids)[None]
        labels = torch.where(torch.from_numpy(row.mask), ids, -100)
        mean = policy(input_ids=ids, labels=labels).loss
        (mean * int(row.mask.sum()) / tokens).backward()
        expected += float(mean.detach()) * int(row.mask.sum())
    assert loss == pytest.approx(expected, rel=1e-5)
    assert difference(ours, gradient_of(policy)) < 1e-5


@given(
    st.lists(st.lists(st.integers(1, 9), min_size=2, max_size=4), min_size=1, max_size=5),
    st.integers(0, 999),
    st.integers(1, 150),
    st.randoms(use_true_random=False),
)
@EXAMPLES
def test_reward_model_gradients_do_not_depend_on_the_cut(
    answers: list[list[int]], seed: int, micro_batch_tokens: int, random: Any
) -> None:
    """Against one prompt after the other, each answer in a pass by itself through transformers' own classifier."""
    _, scorer = models()
    rng = np.random.default_rng(seed)
    comparisons = []
    for i, lengths in enumerate(answers):
        prompt = tuple(rng.integers(3, VOCABULARY, rng.integers(1, 9)).tolist())
        ids = tuple((*rng.integers(3, VOCABULARY, n).tolist(), 3 + k, EOS) for k, n in enumerate(lengths))
        names = tuple(map(str, range(len(lengths))))
        comparisons.append(RankedAnswers(str(i), "", prompt, names, ids, None, "toy"))
    shuffled = random.sample(comparisons, len(comparisons))
    forward = forward_of(scorer, micro_batch_tokens)
    found = ranked_pass(forward, shuffled, Ranks(1), scale=1 / len(comparisons))
    ours = gradient_of(scorer)
    expected = 0.0
    for c in comparisons:
        scores = [scorer(input_ids=torch.tensor([[*c.prompt_ids, *ids]])).logits[0, 0] for ids in c.response_ids]
        count = len(scores)
        pairs = [(i, j) for i in range(count) for j in range(i + 1, count)]
        losses = torch.stack([torch.log1p(torch.exp(scores[j] - scores[i])) for i, j in pairs])
        loss = losses.mean() / len(comparisons)
        loss.backward()
        expected += float(loss.detach())
    assert found.loss == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert difference(ours, gradient_of(scorer)) < 1e-5


def test_the_cuts_above_are_real_cuts() -> None:
    """Small limits give several micro-batches, large ones one: the properties compare different computations."""
    sizes = [(1, length) for length in (5, 9, 14, 3)]
    assert len(micro_batches(sizes, 1)) == 4 and len(micro_batches(sizes, 120)) == 1
