"""Loading, saving and refusals of models and tokenizers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BartConfig,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    MixtralConfig,
    OPTConfig,
    PreTrainedTokenizerBase,
    Qwen3Config,
    ViTConfig,
)

from rayrlhf.config_file import parse_config
from rayrlhf.data.rows import Row
from rayrlhf.data.tokens import sampling_of
from rayrlhf.errors import UserError
from rayrlhf.models.batching import collate
from rayrlhf.models.checks import check_architecture, check_head_size, parameter_counts
from rayrlhf.models.classifier import Classifier, inspect_classifier
from rayrlhf.models.ends import with_ends
from rayrlhf.models.forward import autocast
from rayrlhf.models.loading import (
    check_vocabulary,
    context_length,
    load_policy,
    load_reward_model,
    load_tokenizer,
    resolve_model,
)
from rayrlhf.models.logprobs import sequence_scores
from rayrlhf.models.saving import save_model
from rayrlhf.sections import DrawConfig
from tests.families import FAMILIES, LLAMA, OPT, TINY, write_model


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
    with pytest.raises(UserError, match="known: embedded:opt-7m, embedded:opt-7m-titles, embedded:opt-tiny"):
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
    with_rows(tmp_path / "other", 8200)
    with pytest.raises(UserError, match="different tokenizers .1 tokens, such as '<new>'"):
        check_vocabulary(TINY, str(tmp_path / "other"))
    with pytest.raises(UserError, match="vocabularies of 8200 and 8192 rows"):
        check_vocabulary(TINY, str(with_rows(Path(shutil.copytree(TINY, tmp_path / "larger")), 8200)))


def with_rows(directory: Path, rows: int) -> Path:
    """Change the config of a model to an embedding of so many rows."""
    settings = json.loads((directory / "config.json").read_text()) | {"vocab_size": rows}
    (directory / "config.json").write_text(json.dumps(settings))
    return directory


@pytest.mark.parametrize("special", [True, False])
def test_a_token_without_a_row_is_one_line(special: bool, tmp_path: Path) -> None:
    """Special tokens that nothing writes may lie behind the embedding, as those for images."""
    for name, token in (("tool", "<tool>"), ("pad", "[PAD]"), ("template", "<|im_end|>")):
        directory = Path(shutil.copytree(TINY, tmp_path / name))
        tokenizer = AutoTokenizer.from_pretrained(directory)
        tokenizer.add_tokens([token], special_tokens=special)
        if name == "pad":
            tokenizer.pad_token = token
        elif name == "template":
            tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
        tokenizer.save_pretrained(directory)
        if special and name == "tool":
            assert len(load_tokenizer(str(directory))) == 8193
        else:
            with pytest.raises(
                UserError, match=r"token '.*' of its tokenizer has id 8192, and its embedding 8192 rows"
            ):
                load_tokenizer(str(directory))
        assert len(load_tokenizer(str(with_rows(directory, 8193)))) == 8193


def test_a_half_downloaded_model_names_the_file(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    load_policy(TINY).save_pretrained(whole, max_shard_size="6MB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(TINY) / name, whole)
    shards = sorted(each.name for each in whole.glob("*.safetensors"))
    assert len(shards) > 2 and resolve_model(str(whole)) == str(whole)

    def refusal(name: str, change: Callable[[Path], object]) -> str:
        directory = Path(shutil.copytree(whole, tmp_path / name))
        change(directory)
        with pytest.raises(UserError) as raised:
            resolve_model(str(directory))
        assert "\n" not in str(raised.value)
        return str(raised.value)

    def cut(file: Path) -> None:
        file.write_bytes(file.read_bytes()[:-1])

    assert f"{shards[1]} is missing, which model.safetensors.index.json names" in refusal(
        "missing", lambda directory: (directory / shards[1]).unlink()
    )
    assert f"{shards[0]} is cut short or damaged" in refusal("cut", lambda directory: cut(directory / shards[0]))
    index = "model.safetensors.index.json"
    assert f"there is {shards[0]}, and neither model.safetensors nor {index}" in refusal(
        "index", lambda directory: (directory / index).unlink()
    )
    assert f"{shards[0]} lacks" in refusal(
        "other", lambda directory: shutil.copy(directory / shards[1], directory / shards[0])
    )
    single = Path(shutil.copytree(TINY, tmp_path / "single"))
    cut(single / "model.safetensors")
    with pytest.raises(UserError, match="model.safetensors is cut short or damaged"):
        resolve_model(str(single))
    # As it meets the copy of a model on the hub, whose files nobody has looked at.
    with pytest.raises(UserError, match=r"its weights are cut short or damaged \(.*\); download or copy it again$"):
        load_policy(str(single))


BART = {"layers": 1, "ffn_dim": 8, "attention_heads": 2}


def test_what_a_later_stage_needs_is_looked_for_first(tmp_path: Path) -> None:
    for name, config in FAMILIES.items():
        config.save_pretrained(tmp_path / name)
        check_architecture(str(tmp_path / name), None, scores=True)
    MixtralConfig(**LLAMA, num_local_experts=2).save_pretrained(tmp_path / "mixtral")
    with pytest.raises(UserError, match="MixtralForCausalLM holds other weights than its files do .6, first .*experts"):
        check_architecture(str(tmp_path / "mixtral"), None, scores=False)
    layers = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in BART.items()}
    BartConfig(d_model=16, vocab_size=20, **layers).save_pretrained(tmp_path / "bart")
    check_architecture(str(tmp_path / "bart"), None, scores=False)
    with pytest.raises(UserError, match="no linear `score` head"):
        check_architecture(str(tmp_path / "bart"), None, scores=True)
    ViTConfig().save_pretrained(tmp_path / "vit")
    with pytest.raises(UserError, match="no language model of type vit"):
        check_architecture(str(tmp_path / "vit"), None, scores=True)


@pytest.mark.parametrize(
    ("model", "size"),
    [
        (OPTConfig(**{**OPT, "hidden_size": 128}), None),
        (OPTConfig(**OPT), 8),
        (Qwen3Config(**LLAMA, head_dim=64), None),  # not the hidden size by the number of heads
        (Qwen3Config(**LLAMA, head_dim=48), 48),
    ],
)
def test_heads_that_cpus_cannot_sample_with_are_refused_first(model: Any, size: int | None, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    policy = check_architecture(str(tmp_path), None, scores=False)
    if size is None:
        check_head_size(policy, "mine")
        return
    with pytest.raises(
        UserError, match=rf"^model 'mine': its attention heads have {size} dimensions, and on CPUs vLLM"
    ):
        check_head_size(policy, "mine")


def test_a_head_on_an_architecture_without_a_classifier(tmp_path: Path) -> None:
    """Saved, loaded again, and given as a reward by its path; the number is that of the base model and the layer."""
    path = write_model(FAMILIES["ernie"], tmp_path / "ernie")
    model = load_reward_model(str(path), fresh_head_seed=3)
    save_model(model, load_tokenizer(str(path)), tmp_path / "rm", reward_bias=0.25)
    again, base = load_reward_model(str(tmp_path / "rm")), AutoModel.from_pretrained(path).eval()
    row = Row.completion([5, 6, 7], [8, 9])
    with torch.no_grad():
        states = base(torch.from_numpy(row.ids)[None]).last_hidden_state[0, -1]
        expected = float(states @ model.score.weight[0]) + 0.25
        found = float(sequence_scores(again, collate([row], pad_token_id=1))[0])
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
    facts = inspect_classifier(str(tmp_path / "rm"), None, None)
    classifier = Classifier(str(tmp_path / "rm"), None, facts.output, dtype="float32", device="cpu", max_tokens=100)
    assert classifier.scores([row.ids.tolist(), [5, 6]])[0] == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_responses_end_with_every_end_that_the_model_has(tmp_path: Path) -> None:
    """Of its chat template and of its generation config; the saved model keeps them, and a run of it finds them."""
    config = parse_config({"name": "x", "data": {"stop_tokens": ["\n"]}}, "test")
    assert with_ends(config, TINY, load_tokenizer(TINY)) == (config, [])
    directory = Path(shutil.copytree(TINY, tmp_path / "model"))
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<pad>{% endfor %}"
    tokenizer.save_pretrained(directory)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0, 100000]}))
    tokenizer = load_tokenizer(str(directory))
    joined, lines = with_ends(config, str(directory), tokenizer)
    assert joined.data.stop_tokens == ("\n", "<pad>", "<s>")
    assert [line.partition(":")[0] for line in lines] == [f"a response also ends with '{t}'" for t in ("<pad>", "<s>")]
    (newline,) = tokenizer("\n", add_special_tokens=False)["input_ids"]
    assert sampling_of(tokenizer, joined.data, DrawConfig(temperature=1.0)).ends == (0, 1, 2, newline)

    save_model(load_policy(str(directory)), tokenizer, tmp_path / "sft", stop_tokens=joined.data.stop_tokens)
    saved = json.loads((tmp_path / "sft" / "generation_config.json").read_text())
    assert saved["eos_token_id"] == [2, newline, 1, 0]
    plain = parse_config({"name": "x"}, "test")
    again, _ = with_ends(plain, str(tmp_path / "sft"), load_tokenizer(str(tmp_path / "sft")))
    assert set(again.data.stop_tokens) == {"\n", "<pad>", "<s>"}


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
    total = sum(p.numel() for p in load_policy(path).parameters())
    assert parameter_counts(check_architecture(path, None, scores=True)) == (0, total)
