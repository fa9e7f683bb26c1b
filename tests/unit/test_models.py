"""Every family's log-probs, values and scores against transformers itself; loading, saving and refusals."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BloomConfig,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    OPTConfig,
    PreTrainedTokenizerBase,
    Qwen2Config,
)

from rayrlhf.batching import Row, TokenBatch, collate, token_batches
from rayrlhf.errors import UserError
from rayrlhf.logprobs import sequence_scores, shares_prompts, token_logprobs, token_values
from rayrlhf.models.loading import (
    autocast,
    check_vocabulary,
    context_length,
    load_policy,
    load_reward_model,
    load_tokenizer,
    parameter_count,
    resolve_model,
    save_model,
)

V = 96
TINY = resolve_model("embedded:opt-tiny")
OPT = {
    "vocab_size": V, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "word_embed_proj_dim": 32,
}  # fmt: skip
LLAMA: dict[str, Any] = {
    "vocab_size": V, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 1,
}  # fmt: skip
FAMILIES = {
    "opt": OPTConfig(**OPT, dropout=0.1, layerdrop=0.1),
    "opt-untied-projected": OPTConfig(**{**OPT, "word_embed_proj_dim": 16}, tie_word_embeddings=False),
    "opt-post-norm": OPTConfig(**{**OPT, "word_embed_proj_dim": 16}, do_layer_norm_before=False),
    "gpt-j": GPTJConfig(vocab_size=V, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=64),
    "gpt-2": GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "gpt-neox": GPTNeoXConfig(
        vocab_size=V, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, attention_dropout=0.1, hidden_dropout=0.1,
    ),
    "bloom": BloomConfig(vocab_size=V, hidden_size=32, n_layer=2, n_head=4, hidden_dropout=0.1, attention_dropout=0.1),
    "llama": LlamaConfig(**LLAMA),
    "qwen2": Qwen2Config(**LLAMA, tie_word_embeddings=True),
}  # fmt: skip


def write_model(config: Any, directory: Path, std: float = 0.3, auto: Any = AutoModelForCausalLM) -> Path:
    """A random model of `config`; large weights, so that positions, masks and dropout would all show."""
    config.pad_token_id, config.bos_token_id, config.eos_token_id = 1, 2, 2
    torch.manual_seed(0)
    model = auto.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, std)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.1)
    model.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(TINY) / name, directory)
    return directory


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
    """Two prompts, one with three answers and one with one, in mixed order."""
    return [
        Row.completion(p, r)
        for p, r in (([2, 9, 8], [5, 6]), ([2, 7], [4, 4, 3]), ([2, 9, 8], [7]), ([2, 9, 8], [6, 6, 6, 3]))
    ]


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
            tokens, values = token_logprobs(policy, batch, 0.7), token_values(value_model, batch)
            scores = sequence_scores(value_model, batch)
            tokens.logprobs.square().sum().backward()
            (values.square().sum() + scores.square().sum()).backward()
            each_token = (each.detach().split(batch.counts) for each in (tokens.logprobs, tokens.entropy, values))
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


def test_a_sliding_window_is_not_shared(tmp_path: Path) -> None:
    config = Qwen2Config(**LLAMA, use_sliding_window=True, sliding_window=4, max_window_layers=0)
    assert not shares_prompts(load_policy(str(write_model(config, tmp_path / "windowed"))))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_logprobs_equal_an_unpadded_forward_pass_of_each_row(family: Path, temperature: float) -> None:
    ours = load_policy(str(family))
    theirs = AutoModelForCausalLM.from_pretrained(family).eval()
    batch = collate(rows(), pad_token_id=1)
    with torch.no_grad():
        found = token_logprobs(ours, batch, temperature)
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
    torch.testing.assert_close(junk.logprobs, found.logprobs, rtol=1e-6, atol=1e-6)


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
    first, second = token_logprobs(model, batch).logprobs, token_logprobs(model, batch).logprobs
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


def test_fresh_head_has_the_published_scale_and_depends_on_its_seed_only(tmp_path: Path) -> None:
    path = str(write_model(OPTConfig(**{**OPT, "hidden_size": 2048, "word_embed_proj_dim": 2048, "ffn_dim": 8,
                                        "num_hidden_layers": 1}), tmp_path / "wide", std=0.01))  # fmt: skip
    heads = [load_reward_model(path, fresh_head_seed=seed).score for seed in (1, 1, 2)]
    assert torch.equal(heads[0].weight, heads[1].weight) and not torch.equal(heads[0].weight, heads[2].weight)
    assert heads[0].bias is None
    assert float(heads[0].weight.detach().std()) == pytest.approx(2049**-0.5, rel=0.05)


def test_existing_head_is_kept(tmp_path: Path) -> None:
    path = write_model(OPTConfig(**OPT, num_labels=1), tmp_path / "rm", auto=AutoModelForSequenceClassification)
    stored = load_file(path / "model.safetensors")["score.weight"]
    assert torch.equal(load_reward_model(str(path), fresh_head_seed=5).score.weight, stored)


@pytest.mark.parametrize(
    "config",
    [
        Gemma2Config(**{**LLAMA, "head_dim": 8}, final_logit_softcapping=30.0),
        CohereConfig(**LLAMA, logit_scale=0.0625),
        GraniteConfig(**LLAMA, logits_scaling=8.0),
    ],
    ids=["softcap", "scale", "scaling"],
)
def test_models_that_process_their_logits_are_refused(config: Any, tmp_path: Path) -> None:
    path = write_model(config, tmp_path / "model", std=0.02)
    with pytest.raises(UserError, match="scales or caps its logits"):
        load_policy(str(path))


def test_a_policy_is_no_reward_model_nor_the_other_way_round(tmp_path: Path) -> None:
    policy = write_model(OPTConfig(**OPT), tmp_path / "policy")
    reward = write_model(OPTConfig(**OPT, num_labels=1), tmp_path / "rm", auto=AutoModelForSequenceClassification)
    three = write_model(OPTConfig(**OPT, num_labels=3), tmp_path / "three", auto=AutoModelForSequenceClassification)
    with pytest.raises(UserError, match="no score head"):
        load_reward_model(str(policy))
    with pytest.raises(UserError, match="this is a reward model"):
        load_policy(str(reward))
    with pytest.raises(UserError, match="3 labels"):
        load_reward_model(str(three))


def test_resolve_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (Path(TINY) / "model.safetensors").is_file()
    assert resolve_model("facebook/opt-125m") == "facebook/opt-125m"
    with pytest.raises(UserError, match="known: embedded:opt-tiny"):
        resolve_model("embedded:opt-huge")
    with pytest.raises(UserError, match="no such directory"):
        resolve_model(str(tmp_path / "missing"))
    with pytest.raises(UserError, match="no such directory"):
        resolve_model("runs/mine/sft")
    model = tmp_path / "model"
    for complaint, name in (("config.json", "config.json"), ("safetensors", "model.safetensors"),
                            ("tokenizer", "tokenizer.json")):  # fmt: skip
        model.mkdir(exist_ok=True)
        with pytest.raises(UserError, match=complaint):
            resolve_model(str(model))
        shutil.copy(Path(TINY) / name, model)
    monkeypatch.chdir(tmp_path)
    assert resolve_model("model") == str(model)


def test_a_hub_name_that_cannot_be_had_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for load in (load_tokenizer, load_policy, load_reward_model, context_length):
        with pytest.raises(UserError, match="hub cannot be reached") as caught:
            load("nobody/no-such-model")
        assert "\n" not in str(caught.value)


def edited_tokenizer(directory: Path, **changes: Any) -> str:
    """The embedded model with other special tokens in its tokenizer_config.json."""
    shutil.copytree(TINY, directory)
    config = json.loads((directory / "tokenizer_config.json").read_text()) | changes
    kept = {key: value for key, value in config.items() if value is not None}
    (directory / "tokenizer_config.json").write_text(json.dumps(kept))
    return str(directory)


def test_pad_is_found_or_refused_and_never_the_eos(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(TINY)
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.padding_side) == ("<pad>", "</s>", "right")
    assert load_tokenizer(edited_tokenizer(tmp_path / "none", pad_token=None)).pad_token == "<pad>"
    assert load_tokenizer(edited_tokenizer(tmp_path / "eos", pad_token="</s>")).pad_token == "<pad>"
    with pytest.raises(UserError, match="no eos_token"):
        load_tokenizer(edited_tokenizer(tmp_path / "no-eos", eos_token=None))


def test_pad_without_a_spare_token(tmp_path: Path) -> None:
    """A vocabulary like GPT-2's: one special token, which is BOS, EOS and UNK at once."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    def write(name: str, vocab_size: int, unk: str) -> str:
        words = {"<|endoftext|>": 0, "a": 1, "b": 2, "<unknown>": 3}
        core = Tokenizer(models.WordLevel(words, unk_token=unk))
        core.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>", unk_token=unk)
        tokenizer.save_pretrained(tmp_path / name)
        GPT2Config(vocab_size=vocab_size, n_embd=8, n_layer=1, n_head=1).save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    assert load_tokenizer(write("unk", 4, "<unknown>")).pad_token == "<unknown>"
    spare_row = load_tokenizer(write("row", 5, "<|endoftext|>"))
    assert (spare_row.pad_token, spare_row.pad_token_id) == ("<pad>", 4)
    with pytest.raises(UserError, match="resize the model's embeddings"):
        load_tokenizer(write("full", 4, "<|endoftext|>"))


def test_check_vocabulary(tmp_path: Path) -> None:
    check_vocabulary(TINY, TINY)
    other: PreTrainedTokenizerBase = load_tokenizer(TINY)
    shutil.copytree(TINY, tmp_path / "other")
    other.add_tokens(["<new>"])
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="different tokenizers .1 tokens differ, such as '<new>'"):
        check_vocabulary(TINY, str(tmp_path / "other"))
    with pytest.raises(UserError, match="vocabulary of 96 rows"):
        check_vocabulary(TINY, str(write_model(OPTConfig(**OPT), tmp_path / "small")))


def test_context_length_of_families() -> None:
    assert context_length(TINY) == 1024
    lengths = {name: context_length(config) for name, config in FAMILIES.items()}
    assert lengths.pop("bloom") == 2048
    assert set(lengths.values()) == {64}


def test_autocast_computes_in_the_asked_type() -> None:
    layer, x = torch.nn.Linear(8, 8), torch.randn(2, 8)
    with autocast("cpu", "bfloat16"):
        assert layer(x).dtype == torch.bfloat16
    with autocast("cpu", "float32"):
        assert layer(x).dtype == torch.float32


def test_parameters_are_counted_without_loading() -> None:
    path = resolve_model("embedded:opt-tiny")
    assert parameter_count(path) == sum(p.numel() for p in load_policy(path).parameters())
