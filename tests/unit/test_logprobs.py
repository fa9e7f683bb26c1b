"""Log-probs, entropies and their gradients on the embedded model; families are in test_models.py."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

import rayrlhf.models.logprobs
from rayrlhf.data.rows import Row
from rayrlhf.models.batching import TokenBatch, collate, pack, token_batches
from rayrlhf.models.forward import autocast
from rayrlhf.models.loading import load_policy, load_reward_model, resolve_model
from rayrlhf.models.logprobs import sequence_scores, token_logprobs, token_logprobs_and_entropy, token_values

TINY = resolve_model("embedded:opt-tiny")
PAD = 1


@pytest.fixture(scope="module")
def policy() -> PreTrainedModel:
    return load_policy(TINY)


def rows(count: int = 7) -> list[Row]:
    generator = torch.Generator().manual_seed(4)
    made = []
    for i in range(count):
        ids = torch.randint(3, 8000, (10 + 7 * i,), generator=generator).tolist()
        made.append(Row.completion(ids[: 3 + 2 * i], ids[3 + 2 * i :]))
    return made


def test_all_tokens_at_once_equal_cross_entropy_of_the_model(policy: PreTrainedModel) -> None:
    row = rows()[-1]
    with torch.no_grad():
        found = token_logprobs(policy, collate([row], PAD))
        ids = torch.from_numpy(row.ids)[None]
        labels = torch.where(torch.from_numpy(row.mask), ids, -100)
        loss = policy(input_ids=ids, labels=labels).loss
    assert -float(found.mean()) == pytest.approx(float(loss), rel=1e-5)


def test_probabilities_of_all_tokens_sum_to_one(policy: PreTrainedModel) -> None:
    vocabulary = policy.config.vocab_size
    made = [Row.completion([2, 100], [token]) for token in range(vocabulary)]
    total = 0.0
    with torch.no_grad():
        for start in range(0, vocabulary, 512):
            found = token_logprobs(policy, collate(made[start : start + 512], PAD), 0.7)
            total += float(found.double().exp().sum())
    assert total == pytest.approx(1.0, abs=1e-4)


def test_entropy_is_that_of_a_uniform_distribution_at_high_temperature(policy: PreTrainedModel) -> None:
    hot = token_logprobs_and_entropy(policy, collate(rows(), PAD), temperature=1e6)
    assert torch.allclose(hot.entropy, torch.tensor(math.log(policy.config.vocab_size)), atol=1e-3)
    assert not hot.entropy.requires_grad and not hot.logprobs.requires_grad


def test_results_lie_in_row_major_order(policy: PreTrainedModel) -> None:
    with torch.no_grad():
        together = token_logprobs(policy, collate(rows(), PAD))
        alone = torch.cat([token_logprobs(policy, collate([row], PAD)) for row in rows()])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("max_tokens", [1, 100, 10_000])
def test_gradient_of_a_sum_does_not_depend_on_the_cut(policy: PreTrainedModel, max_tokens: int, packed: bool) -> None:
    def gradient(limit: int, packed: bool = False) -> torch.Tensor:
        policy.zero_grad(set_to_none=True)
        for _, batch in token_batches(rows(), limit, PAD, "cpu", packed=packed):
            token_logprobs(policy, batch).sum().backward()
        return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])

    expected, found = gradient(300), gradient(max_tokens, packed)
    assert float((found - expected).norm() / expected.norm()) < 1e-5


class Logits(TorchDispatchMode):
    """The most rows over the vocabulary in anything that is computed, backward passes included."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.vocabulary, self.rows = vocabulary, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if isinstance(each, torch.Tensor) and each.shape[-1:] == (self.vocabulary,):
                self.rows = max(self.rows, each.numel() // self.vocabulary)
        return result


def test_logits_are_held_a_chunk_at_a_time(policy: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary, batch = policy.config.vocab_size, collate(rows(14), PAD)
    width = policy.config.hidden_size  # of the weight's gradient
    assert sum(batch.counts) > 2 * width
    for limit, low, high in ((2**25, sum(batch.counts), sum(batch.counts)), (64 * vocabulary, 64, width)):
        monkeypatch.setattr(rayrlhf.models.logprobs, "LOGITS", limit)
        with Logits(vocabulary) as logits:
            token_logprobs(policy, batch, 0.7).sum().backward()
            token_logprobs_and_entropy(policy, batch, 0.7)
        assert low <= logits.rows <= high


def test_what_is_kept_for_the_backward_pass_is_no_chunk_of_logits(
    policy: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocabulary, batch = policy.config.vocab_size, collate(rows(), PAD)

    def kept() -> int:
        shapes: list[tuple[int, ...]] = []

        def pack(saved: torch.Tensor) -> torch.Tensor:
            shapes.append(tuple(saved.shape))
            return saved

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
            token_logprobs(policy, batch, 0.7)
        weight = policy.config.hidden_size * vocabulary
        return sum(shape[-1:] == (vocabulary,) and math.prod(shape) != weight for shape in shapes)

    assert kept() > 0
    monkeypatch.setattr(rayrlhf.models.logprobs, "LOGITS", 8 * vocabulary)
    assert kept() == 0


def test_rows_without_predicted_tokens_give_nothing(policy: PreTrainedModel) -> None:
    row = rows()[0]
    batch = collate([Row(row.ids, row.mask & False), row], PAD)
    found = token_logprobs(policy, batch)
    assert batch.counts == [0, 7] and found.shape == (7,)


def test_value_of_the_state_before_a_token_sees_nothing_of_it() -> None:
    model = load_reward_model(TINY, fresh_head_seed=0)
    one, other = Row.completion([2, 50, 60], [70, 80]), Row.completion([2, 50, 60], [99, 80])
    with torch.no_grad():
        values = token_values(model, collate([one, other], PAD)).reshape(2, 2)
        scores = sequence_scores(model, collate([one, other], PAD))
    assert values[0, 0] == pytest.approx(float(values[1, 0]), abs=1e-6)
    assert abs(float(values[0, 1] - values[1, 1])) > 1e-4
    assert abs(float(scores[0] - scores[1])) > 1e-4


@pytest.mark.parametrize("limit", [2**25, 2**17])
def test_bfloat16_autocast_stays_close_and_returns_float32(
    policy: PreTrainedModel, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where logits are cut into chunks and prompts are shared."""
    monkeypatch.setattr(rayrlhf.models.logprobs, "LOGITS", limit)
    made = [row for row in rows() for _ in range(2)]
    batch = pack(made, shares=[2] * 7)

    def measure(batch: TokenBatch, dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
        policy.zero_grad()
        with autocast("cpu", dtype):
            logprobs = token_logprobs(policy, batch)
        logprobs.sum().backward()
        return logprobs.detach(), torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])

    exact, gradient = measure(collate(made, PAD), "float32")
    rough, rough_gradient = measure(batch, "bfloat16")
    assert 0 < float((rough_gradient - gradient).norm()) < 0.05 * float(gradient.norm())
    assert rough.dtype == torch.float32
    gap = float((rough - exact).abs().mean())
    assert 0 < gap < 0.1
