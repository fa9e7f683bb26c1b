"""Every family's log-probs, values and scores against transformers itself, however they are laid out and cut."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
)

import rayrlhf.models.logprobs
from rayrlhf.data.rows import Row
from rayrlhf.models.attention import PACKED, packs
from rayrlhf.models.batching import TokenBatch, collate, pack, token_batches
from rayrlhf.models.loading import checkpoint_gradients, load_policy, load_reward_model, load_tokenizer
from rayrlhf.models.logprobs import (
    hidden_states,
    sequence_scores,
    token_logprobs,
    token_logprobs_and_entropy,
    token_values,
)
from rayrlhf.models.saving import save_model
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


def laid_out(model: PreTrainedModel) -> TokenBatch:
    """The rows as the model gets them in training."""
    return pack(rows()) if packs(model) else collate(rows(), pad_token_id=1)


def with_other_padding(batch: TokenBatch) -> TokenBatch:
    lengths = batch.ends % batch.input_ids.shape[1] + 1
    behind = torch.arange(batch.input_ids.shape[1]) >= lengths[:, None]
    junk = torch.randint(3, V, batch.input_ids.shape, generator=torch.Generator().manual_seed(2))
    return dataclasses.replace(batch, input_ids=torch.where(behind, junk, batch.input_ids))


def answers() -> list[Row]:
    """Three prompts, one with five answers and two with one, in mixed order, two of the rows equally long; packed they
    are longer than the context of the models, and than what attention kernels do in one go."""
    generator = torch.Generator().manual_seed(3)
    prompts, lengths = {0: 25, 1: 8, 2: 10}, ((0, 14), (1, 9), (0, 7), (0, 22), (2, 7), (0, 4), (0, 14))
    ids = {i: torch.randint(3, V, (n,), generator=generator).tolist() for i, n in prompts.items()}
    return [Row.completion(ids[i], torch.randint(3, V, (n,), generator=generator).tolist()) for i, n in lengths]


def test_packed_rows_are_those_that_stand_alone(family: Path) -> None:
    """Log-probs, entropies, values, scores and gradients of rows that lie behind one another and share prompts."""
    policy, value_model = load_policy(str(family)), load_reward_model(str(family), fresh_head_seed=3)
    packed = packs(policy)
    # BLOOM has positions in its attention scores; GPT-J cannot exchange its attention; Ernie is not in _TESTED.
    assert packed == packs(value_model) == (family.name not in {"bloom", "gpt-j", "ernie"})

    def measure(batches: Iterable[tuple[list[int], TokenBatch]]) -> tuple[dict[int, list[Tensor]], Tensor]:
        found: dict[int, list[Tensor]] = {}
        policy.zero_grad()
        value_model.zero_grad()
        for indices, batch in batches:
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

    alone, gradient = measure(([i], collate([row], pad_token_id=1)) for i, row in enumerate(answers()))
    for max_tokens in (1000, 60):
        batches = list(token_batches(answers(), max_tokens, 1, "cpu", packed=packed))
        computed = sum(batch.input_ids.numel() for _, batch in batches)
        assert not packed or computed < 0.9 * sum(len(row.ids) for row in answers())
        together, other_gradient = measure(batches)
        assert sorted(together) == sorted(alone)
        for i in alone:
            for one, other in zip(alone[i], together[i], strict=True):
                torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)
        assert (other_gradient - gradient).norm() < 1e-5 * gradient.norm()


def test_packing_is_exact_in_double_precision(family: Path) -> None:
    """What is left of the difference is rounding. (A mask of another type than the model would show here.)"""
    model = load_policy(str(family)).double()

    def states(packed: bool) -> Tensor:
        found: dict[int, Tensor] = {}
        with torch.no_grad():
            for indices, batch in token_batches(answers(), 1000, 1, "cpu", packed=packed):
                parts = hidden_states(model, batch)[batch.states].split(batch.counts)
                found |= dict(zip(indices, parts, strict=True))
        return torch.cat([found[i] for i in range(len(answers()))])

    alone = states(False)
    assert float((states(packs(model)) - alone).norm()) < 1e-12 * float(alone.norm())


def test_a_sliding_window_is_not_packed(tmp_path: Path) -> None:
    windowed = {
        "qwen2": Qwen2Config(**LLAMA, use_sliding_window=True, sliding_window=4, max_window_layers=0),
        "mistral": MistralConfig(**LLAMA, sliding_window=4),
    }
    for name, config in windowed.items():
        assert not packs(load_policy(str(write_model(config, tmp_path / name))))


def test_a_model_that_has_computed_packed_rows_is_otherwise_as_it_was(family: Path, tmp_path: Path) -> None:
    """Padding masks still hide, and nothing of our attention is saved."""
    model, fresh = load_policy(str(family)), AutoModelForCausalLM.from_pretrained(family).eval()
    if packs(model):
        token_logprobs(model, pack(rows())).sum().backward()
        assert model.config._attn_implementation == PACKED
    ids = torch.tensor([[1, 1, 5, 6, 7], [5, 6, 7, 8, 9]])
    mask = (ids != 1).long()
    with torch.no_grad():
        ours, theirs = (each(input_ids=ids, attention_mask=mask).logits for each in (model, fresh))
    torch.testing.assert_close(ours[mask.bool()], theirs[mask.bool()], rtol=1e-5, atol=1e-5)
    for each, name in ((model, "saved"), (load_policy(str(family)), "unused")):
        save_model(each, load_tokenizer(str(family)), tmp_path / name)
    saved, unused = ((tmp_path / name / "config.json").read_text() for name in ("saved", "unused"))
    assert saved == unused and PACKED not in saved


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logits_in_chunks_change_nothing(family: Path, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Log-probs, entropy and gradients, with heads that are tied, untied and biased, against one chunk for all."""
    policy = load_policy(str(family))
    batch = laid_out(policy)

    def measure() -> list[torch.Tensor]:
        policy.zero_grad()
        logprobs = token_logprobs(policy, batch, temperature)
        logprobs.square().sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])
        return [logprobs.detach(), gradient, *token_logprobs_and_entropy(policy, batch, temperature)]

    whole = measure()
    monkeypatch.setattr(rayrlhf.models.logprobs, "LOGITS", 4 * V)
    for found, expected in zip(measure(), whole, strict=True):
        assert float((found - expected).norm()) <= 1e-6 * float(expected.norm())


def test_gradient_checkpointing_keeps_less_and_changes_nothing(family: Path) -> None:
    policy = load_policy(str(family))
    batch = laid_out(policy)

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
        laid = token_logprobs_and_entropy(ours, laid_out(ours), temperature)
        junk = token_logprobs(ours, with_other_padding(batch), temperature)
        expected, entropies = [], []
        for row in rows():
            ids = torch.from_numpy(row.ids)[None]
            mask = torch.from_numpy(row.mask)[1:]
            reference = torch.log_softmax(theirs(ids).logits[0, :-1].double() / temperature, dim=-1)[mask]
            expected.append(reference.gather(1, ids[0, 1:][mask][:, None])[:, 0])
            entropies.append(-(reference.exp() * reference).sum(-1))
    for each in (found, laid):
        torch.testing.assert_close(each.logprobs.double(), torch.cat(expected), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(each.entropy.double(), torch.cat(entropies), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(junk, found.logprobs, rtol=1e-6, atol=1e-6)


def test_values_and_scores_equal_transformers_own_classifier_on_unpadded_rows(family: Path, tmp_path: Path) -> None:
    fresh = load_reward_model(str(family), fresh_head_seed=3)
    save_model(fresh, load_tokenizer(str(family)), tmp_path / "rm", reward_bias=0.75)
    ours = load_reward_model(str(tmp_path / "rm"))
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm").eval()
    batch = collate(rows(), pad_token_id=1)
    with torch.no_grad():
        scores, values = sequence_scores(ours, batch), token_values(ours, batch)
        torch.testing.assert_close(sequence_scores(ours, laid_out(ours)), scores, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(token_values(ours, laid_out(ours)), values, rtol=1e-5, atol=1e-5)
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
    batch = laid_out(model)
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
