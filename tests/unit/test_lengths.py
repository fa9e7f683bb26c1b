"""Lengths of prompts and responses that are chosen by the data, and stay what they were; the cache that they need."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, OPTConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen3Config

from jobs import choices
from jobs.choices import with_lengths, with_resources
from jobs.data import show_data
from rayrlhf.config import Config
from rayrlhf.config_file import parse_config
from rayrlhf.data.lengths import choose_lengths
from rayrlhf.errors import UserError
from rayrlhf.machine import Machine
from rayrlhf.models.kv_cache import kv_cache_mib
from rayrlhf.models.loading import resolve_model
from rayrlhf.runs.contents import read_contents
from rayrlhf.runs.folder import open_or_create, run_at, stored_config
from tests.families import LLAMA, OPT
from tests.rows import write_rows

MICRO_BATCHES = (
    "; micro_batch_tokens=4096 of sft, reward_model, rl (more is hardly faster)"
    "; micro_batch_tokens=8192 of scorers (more is hardly faster)"
)
RL_ALONE = {"stages": ["rl"], "sft": {"from": "model"}, "rewards": [{"kind": "python", "path": "a.py:a", "name": "a"}]}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    """A token for each word, and one at the end of a response."""
    words = {"</s>": 0, "word": 1, **{f"n{i}": 2 + i for i in range(100)}}
    own = Tokenizer(models.WordLevel(words, unk_token="word"))
    own.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=own, eos_token="</s>", pad_token="</s>")


def words(count: int, first: int) -> str:
    return " ".join([f"n{first}", *["word"] * (count - 1)])


@pytest.fixture
def demonstrations(tmp_path: Path) -> str:
    """40 rows: prompts of 1 to 40 words, and responses of 40 to 1."""
    directory = tmp_path / "demonstrations"
    directory.mkdir()
    rows = [{"prompt": words(i, i), "response": words(41 - i, i)} for i in range(1, 41)]
    write_rows(directory / "train.jsonl", rows)
    write_rows(directory / "validation.jsonl", [{"prompt": words(99, 50), "response": words(99, 50)}])
    return str(directory)


def config(demonstrations: str, data: Any = None, **settings: Any) -> Config:
    return parse_config({"name": "a", "data": {"demonstrations": demonstrations, **(data or {})}, **settings}, "test")


@pytest.mark.parametrize(
    ("context", "given", "prompt", "response"),
    [
        (1000, {}, 38, 39),  # 38 of 40 prompts have at most 38 words, and 38 responses at most 38 and their end
        (77, {}, 38, 39),
        (60, {}, 30, 30),  # of a context that is too short each has half,
        (60, {"max_prompt_tokens": 10}, 10, 39),  # or what the other leaves
        (60, {"max_response_tokens": 50}, 10, 50),
        (60, {"max_prompt_tokens": 7, "max_response_tokens": 8}, 7, 8),
        (60, {"max_prompt_tokens": 99}, 99, 1),  # refused later, with the numbers
        (1000, {"min_response_tokens": 60}, 38, 61),
    ],
)
def test_most_texts_fit(
    tokenizer: PreTrainedTokenizerBase,
    demonstrations: str,
    context: int,
    given: dict[str, int],
    prompt: int,
    response: int,
) -> None:
    found, _ = choose_lengths(config(demonstrations, given), tokenizer, context)
    assert (found.data.max_prompt_tokens, found.data.max_response_tokens) == (prompt, response)
    assert found.data.to_choose == () and choose_lengths(found, tokenizer, context) == (found, None)


def test_the_line_counts_what_is_cut(tokenizer: PreTrainedTokenizerBase, demonstrations: str) -> None:
    _, line = choose_lengths(config(demonstrations, {"max_prompt_tokens": "auto"}), tokenizer, 1000)
    assert line == (
        "chosen by the data and the model's context of 1000 tokens: "
        "data.max_prompt_tokens=38 (2 of 40 prompts are longer, up to 40), "
        "data.max_response_tokens=39 (2 of 40 responses are longer, up to 41)"
    )
    _, line = choose_lengths(config(demonstrations, {"max_prompt_tokens": 5}), tokenizer, 1000)
    assert line and "max_prompt_tokens" not in line


def test_which_texts_count(tokenizer: PreTrainedTokenizerBase, demonstrations: str, tmp_path: Path) -> None:
    """Those of all sources; responses only where a stage learns from them."""

    def found(data: Any = None, **settings: Any) -> tuple[int, int]:
        own = choose_lengths(config(demonstrations, data, **settings), tokenizer, 1000)[0].data
        return own.max_prompt_tokens, own.max_response_tokens

    pairs = [
        {"prompt": words(50, i), "chosen": words(60, i), "rejected": words(70, i)} for i in range(100)
    ]  # 200 answers: 100 of 61 tokens, 100 of 71
    comparisons = {"comparisons": write_rows(tmp_path / "pairs.jsonl", pairs)}
    assert found(comparisons) == (50, 71)
    thumbs = [{"prompt": words(50, i), "completion": words(60, i), "label": i % 2 == 0} for i in range(100)]
    labelled = {"comparisons": write_rows(tmp_path / "thumbs.jsonl", thumbs)}
    assert found(labelled, stages=["sft", "dpo"], dpo={"loss": "kto"}) == (50, 61)
    asked = {"prompts": write_rows(tmp_path / "prompts.jsonl", [{"prompt": words(80, i)} for i in range(100)])}
    assert found(asked) == (80, 39)
    assert found(**RL_ALONE) == (38, 128)
    overlong = {"steps": 1, "overlong_tokens": 70}
    assert found(rl=overlong) == (38, 70)


def test_a_response_that_could_not_end_is_refused(tokenizer: PreTrainedTokenizerBase, demonstrations: str) -> None:
    with pytest.raises(
        UserError, match=r"min_response_tokens=90: of the model's context of 100 tokens, 62 are for a r"
    ):
        choose_lengths(config(demonstrations, {"min_response_tokens": 90}), tokenizer, 100)


def test_lengths_stay_what_they_were(
    demonstrations: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerBase
) -> None:
    """While data and model do, also in a run that begins from another one."""
    calls = []

    def choose(config: Config, tokenizer: PreTrainedTokenizerBase, context: int) -> tuple[Config, str]:
        calls.append(context)
        lengths = {"max_prompt_tokens": 5, "max_response_tokens": len(calls)}
        return config.model_copy(update={"data": config.data.completed(lengths)}), "chosen"

    monkeypatch.setattr(choices, "choose_lengths", choose)
    model = resolve_model("embedded:opt-tiny")

    def opened(**settings: Any) -> tuple[int, str | None]:
        own = config(demonstrations, **settings)
        contents = read_contents(own, {}, {})
        run = run_at(tmp_path / "runs" / own.name)
        own, line = with_lengths(own, run, model, contents)
        open_or_create(own, tmp_path / "runs", contents=contents)
        assert stored_config(run).data == own.data
        return own.data.max_response_tokens, line

    assert opened() == (1, "chosen") and calls == [1024]
    same = "as before: data.max_prompt_tokens=5, data.max_response_tokens=1"
    assert opened() == opened(rl={"steps": 3}) == (1, same)
    assert opened(name="b", **{"from": str(tmp_path / "runs" / "a")}) == (1, same)
    assert opened(data={"max_prompt_tokens": 6}) == (2, "chosen"), "what is given decides about the rest"
    assert opened(data={"max_prompt_tokens": 6}) == (2, "as before: data.max_response_tokens=2")
    write_rows(Path(demonstrations) / "train.jsonl", [{"prompt": "word", "response": "n1"}])
    assert opened() == (3, "chosen") and opened()[0] == 3


@pytest.mark.parametrize(
    ("model", "dtype", "bytes_a_token"),
    [
        (OPTConfig(**OPT), "float32", 2 * 2 * 4 * 8 * 4),  # keys and values, layers, heads, their size, bytes
        (LlamaConfig(**LLAMA), "bfloat16", 2 * 2 * 2 * 8 * 2),  # of four heads, two have keys
        (Qwen3Config(**LLAMA, head_dim=16), "float32", 2 * 2 * 2 * 16 * 4),
    ],
)
def test_the_cache_holds_all_sequences(tmp_path: Path, model: Any, dtype: str, bytes_a_token: int) -> None:
    model.save_pretrained(tmp_path)
    # 65 tokens are three blocks of 32.
    assert kv_cache_mib(str(tmp_path), None, dtype, 2**14, 65) == 2**14 * 96 * bytes_a_token / 2**20
    assert kv_cache_mib(str(tmp_path), None, dtype, 1, 1) == 1


def test_resources_are_chosen_for_the_machine(
    monkeypatch: pytest.MonkeyPatch, demonstrations: str, tmp_path: Path
) -> None:
    LlamaConfig(**LLAMA).save_pretrained(tmp_path / "model")
    monkeypatch.setattr(choices, "this_machine", lambda: Machine(2, 0, 2**40))
    lengths = {"max_prompt_tokens": 100, "max_response_tokens": 28}
    found, line = with_resources(config(demonstrations, lengths), str(tmp_path / "model"))
    # 128 sequences of 128 tokens of 256 bytes
    assert line == (
        "resources, by 1 machine with 2 cores and 0 GPUs: generators 1 × (0.5 CPUs, 1 threads); "
        "scorers 1 × (0.5 CPUs, 2 threads); learner 1 × (1 CPUs, 2 threads); KV cache 4 MiB" + MICRO_BATCHES
    )
    assert found.resources.generators.kv_cache_mib == 4
    named = config(demonstrations, lengths, resources={"generators": {"count": 2, "max_num_seqs": 64}})
    found, line = with_resources(named, str(tmp_path / "model"))
    assert line == "resources, by 1 machine with 2 cores and 0 GPUs: KV cache 2 MiB" + MICRO_BATCHES
    assert found.resources.generators.cpus == 1.0 and found.resources.generators.kv_cache_mib == 2
    for generators in ({"kv_cache_mib": 9}, {"gpus": 1.0}):
        micro_batch = {"micro_batch_tokens": 1}
        stages = dict.fromkeys(("sft", "reward_model", "dpo", "rl"), micro_batch)
        given = config(demonstrations, lengths, resources={"generators": generators, "scorers": micro_batch}, **stages)
        assert with_resources(given, str(tmp_path / "model")) == (given, None)


def test_rayrlhf_data_says_what_is_chosen(demonstrations: str) -> None:
    from rich.console import Console

    console = Console(record=True, width=1000)
    show_data(demonstrations, [], None, console)
    shown = console.export_text()
    assert "chosen by the data and the model's context of 256 tokens: data.max_prompt_tokens=" in shown
