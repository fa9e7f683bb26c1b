"""Every family's log-probs, values and scores against transformers itself, however they are laid out and cut."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Qwen2Config

import rayrlhf.logprobs
from rayrlhf.batching import Row, TokenBatch, collate, token_batches
from rayrlhf.logprobs import (
    hidden_states,
    sequence_scores,
    shares_prompts,
    token_logprobs,
    token_logprobs_and_entropy,
    token_values,
)
from rayrlhf.models.loading import checkpoint_gradients, load_policy, load_reward_model, load_tokenizer, save_model
from tests.families import FAMILIES, LLAMA, V, write_model


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(FAMILIES[request.param], tmp_path_factory.mktemp("models") / request.param)


def rows() -> list[Row]:
    """Four rows of mixed lengths; the EOS id also stands in the prompt, as OPT's BOS does."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for prompt, response in ((5, 9), (1, 1), (20, 3), (2, 12)):
        ids = torch.randint(3, V, (prompt + response,), generator=generator).tolist()
        made.append(Row.completion([2, *ids[1:prompt]], ids[prompt:]))
    return made


def with_other_padding(batch: TokenBatch) -> TokenBatch:
    lengths = batch.ends % batch.input_ids.shape[1] + 1
    behind = torch.arange(batch.input_ids.shape[1]) >= lengths[:, None]
    junk = torch.randint(3, V, batch.input_ids.shape, generator=torch.Generator().manual_seed(2))
    return dataclasses.replace(batch, input_ids=torch.where(behind, junk, batch.input_ids))


def answers() -> list[Row]:
    """Two prompts, one with three answers and one with one, in mixed order; the line of the first is longer than the
    context of the models, and than what attention kernels do in one go."""
    generator = torch.Generator().manual_seed(3)
    prompts, lengths = {0: 25, 1: 8}, ((0, 14), (1, 9), (0, 7), (0, 22))
    ids = {i: torch.randint(3, V, (n,), generator=generator).tolist() for i, n in prompts.items()}
    return [Row.completion(ids[i], torch.randint(3, V, (n,), generator=generator).tolist()) for i, n in lengths]


def test_a_shared_prompt_changes_nothing(family: Path) -> None:
    """Log-probs, entropies, values, scores and gradients are those of rows that stand alone."""
    policy, value_model = load_policy(str(family)), load_reward_model(str(family), fresh_head_seed=3)
    # BLOOM's positions are part of its attention scores.
    shares = family.name != "bloom"
    assert shares_prompts(policy) == shares_prompts(value_model) == shares

    def measure(share: bool) -> tuple[dict[int, list[torch.Tensor]], torch.Tensor]:
        found: dict[int, list[torch.Tensor]] = {}
        policy.zero_grad()
        value_model.zero_grad()
        for indices, batch in token_batches(answers(), 1000, 1, "cpu", share=share):
            assert len(batch.input_ids) == (2 if share else 4)
            logprobs, values = token_logprobs(policy, batch, 0.7), token_values(value_model, batch)
            scores = sequence_scores(value_model, batch)
            logprobs.square().sum().backward()
            (values.square().sum() + scores.square().sum()).backward()
            entropy = token_logprobs_and_entropy(policy, batch, 0.7).entropy
            each_token = (each.detach().split(batch.counts) for each in (logprobs, entropy, values))
            parts = zip(*each_token, scores.detach(), strict=True)
            found |= {i: list(part) for i, part in zip(indices, parts, strict=True)}
        parameters = [*policy.parameters(), *value_model.parameters()]
        return found, torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])

    (alone, gradient), (shared, shared_gradient) = measure(False), measure(shares)
    assert sorted(shared) == [0, 1, 2, 3]
    for i in alone:
        for one, other in zip(alone[i], shared[i], strict=True):
            torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)
    assert (shared_gradient - gradient).norm() < 1e-5 * gradient.norm()


def test_sharing_is_exact_in_double_precision(family: Path) -> None:
    """What is left of the difference is rounding. (A mask of another type than the model would show here.)"""
    model = load_policy(str(family)).double()
    if not shares_prompts(model):
        assert family.name == "bloom"
        return

    def states(share: bool) -> torch.Tensor:
        found: dict[int, torch.Tensor] = {}
        with torch.no_grad():
            for indices, batch in token_batches(answers(), 1000, 1, "cpu", share=share):
                parts = hidden_states(model, batch)[batch.states].split(batch.counts)
                found |= dict(zip(indices, parts, strict=True))
        return torch.cat([found[i] for i in range(4)])

    alone = states(False)
    assert float((states(True) - alone).norm()) < 1e-12 * float(alone.norm())


def test_a_sliding_window_is_not_shared(tmp_path: Path) -> None:
    config = Qwen2Config(**LLAMA, use_sliding_window=True, sliding_window=4, max_window_layers=0)
    assert not shares_prompts(load_policy(str(write_model(config, tmp_path / "windowed"))))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logits_in_chunks_change_nothing(family: Path, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Log-probs, entropy and gradients, with heads that are tied, untied and biased, against one chunk for all."""
    policy, batch = load_policy(str(family)), collate(rows(), pad_token_id=1)

    def measure() -> list[torch.Tensor]:
        policy.zero_grad()
        logprobs = token_logprobs(policy, batch, temperature)
        logprobs.square().sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])
        return [logprobs.detach(), gradient, *token_logprobs_and_entropy(policy, batch, temperature)]

    whole = measure()
    monkeypatch.setattr(rayrlhf.logprobs, "LOGITS", 4 * V)
    for found, expected in zip(measure(), whole, strict=True):
        assert float((found - expected).norm()) <= 1e-6 * float(expected.norm())


def test_gradient_checkpointing_keeps_less_and_changes_nothing(family: Path) -> None:
    policy, batch = load_policy(str(family)), collate(rows(), pad_token_id=1)

    def measure() -> tuple[int, list[torch.Tensor]]:
        kept: list[int] = []

        def pack(saved: torch.Tensor) -> torch.Tensor:
            kept.append(saved.numel())
            return saved

        policy.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
            logprobs = token_logprobs(policy, batch, 0.7)
        logprobs.square().sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])
        return sum(kept), [logprobs.detach(), gradient]

    whole, expected = measure()
    checkpoint_gradients(policy)
    less, found = measure()
    assert less < 0.5 * whole
    for ours, theirs in zip(found, expected, strict=True):
        assert float((ours - theirs).norm()) <= 1e-6 * float(theirs.norm())


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_logprobs_equal_an_unpadded_forward_pass_of_each_row(family: Path, temperature: float) -> None:
    ours = load_policy(str(family))
    theirs = AutoModelForCausalLM.from_pretrained(family).eval()
    batch = collate(rows(), pad_token_id=1)
    with torch.no_grad():
        found = token_logprobs_and_entropy(ours, batch, temperature)
        junk = token_logprobs(ours, with_other_padding(batch), temperature)
        expected, entropies = [], []
        for row in rows():
            ids = torch.from_numpy(row.ids)[None]
            mask = torch.from_numpy(row.mask)[1:]
            reference = torch.log_softmax(theirs(ids).logits[0, :-1].double() / temperature, dim=-1)[mask]
            expected.append(reference.gather(1, ids[0, 1:][mask][:, None])[:, 0])
            entropies.append(-(reference.exp() * reference).sum(-1))
    torch.testing.assert_close(found.logprobs.double(), torch.cat(expected), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.entropy.double(), torch.cat(entropies), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(junk, found.logprobs, rtol=1e-6, atol=1e-6)


def test_values_and_scores_equal_transformers_own_classifier_on_unpadded_rows(family: Path, tmp_path: Path) -> None:
    fresh = load_reward_model(str(family), fresh_head_seed=3)
    save_model(fresh, load_tokenizer(str(family)), tmp_path / "rm", reward_bias=0.75)
    ours = load_reward_model(str(tmp_path / "rm"))
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm").eval()
    batch = collate(rows(), pad_token_id=1)
    with torch.no_grad():
        scores, values = sequence_scores(ours, batch), token_values(ours, batch)
        junk = with_other_padding(batch)
        torch.testing.assert_close(sequence_scores(ours, junk), scores, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(token_values(ours, junk), values, rtol=1e-6, atol=1e-6)
        for row, score, row_values in zip(rows(), scores, values.split(batch.counts), strict=True):
            ids = torch.from_numpy(row.ids)[None]
            plain = theirs(input_ids=ids).logits[0, 0]
            torch.testing.assert_close(score, plain + 0.75, rtol=1e-5, atol=1e-5)
            # The value of a state is the score of the sequence that ends there, bias included: cut before each token.
            ends = [int(t) for t in torch.from_numpy(row.mask).nonzero()[:, 0]]
            prefixes = torch.stack([theirs(input_ids=ids[:, :t]).logits[0, 0] for t in ends])
            torch.testing.assert_close(row_values, prefixes + 0.75, rtol=1e-5, atol=1e-5)


def test_no_dropout_even_in_training_mode_and_gradients_flow(family: Path) -> None:
    model = load_policy(str(family)).train()
    batch = collate(rows(), pad_token_id=1)
    first, second = token_logprobs(model, batch), token_logprobs(model, batch)
    assert torch.equal(first, second)
    first.sum().backward()
    assert all(p.grad is not None and p.dtype == torch.float32 for p in model.parameters())


def test_save_and_load_keep_every_weight(family: Path, tmp_path: Path) -> None:
    model, tokenizer = load_policy(str(family)), load_tokenizer(str(family))
    save_model(model, tokenizer, tmp_path / "copy")
    save_model(model, tokenizer, tmp_path / "copy")  # replaces
    again = load_policy(str(tmp_path / "copy"))
    for (name, before), (_, after) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(before, after), name
    assert [p.name for p in tmp_path.iterdir()] == ["copy"]
    generation = json.loads((tmp_path / "copy" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 2 and generation["pad_token_id"] == 1
    assert not {"temperature", "top_p", "top_k", "do_sample"} & generation.keys()
    stored = load_file(tmp_path / "copy" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
