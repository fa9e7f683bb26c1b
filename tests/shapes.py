"""What people bring: data sets of six shapes, and tiny random models of four families with tokenizers of their own."""

from __future__ import annotations

import csv
import gzip
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from tests.rows import write_rows

ROWS = 160
_WHAT = ("tea", "coffee", "rain", "snow", "bread", "iron", "wool", "salt")
_HOW = ("made", "kept", "sold", "used")
_WHERE = ("at home", "in towns", "by the sea", "on hills", "in winter")


def questions() -> Iterator[tuple[str, str, str]]:
    """A question, a good answer to it and a bad one; no two questions are equal."""
    for what, how, where in itertools.islice(itertools.product(_WHAT, _HOW, _WHERE), ROWS):
        yield f"How is {what} {how} {where}?", f"It is {how} {where} with care and time.", "Nobody knows, go away now."


# ---- data sets: each writes its files and returns the lines of the config that name them

_LEARNT = "sft: {epochs: 10, batch_size: 8, optimizer: {lr: 0.003}}\n"
"""For data without comparisons: `collect` leaves out answers of less than five words, as random models mostly give."""


def preferences_in_csv(directory: Path) -> str:
    """TRL's explicit preferences."""
    with (directory / "pairs.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerows([("prompt", "chosen", "rejected"), *questions()])
    path = directory / "pairs.csv"
    return f"data: {{demonstrations: {path}, comparisons: {path}}}\n"


def implicit_dialogues(directory: Path) -> str:
    """TRL's conversational preferences, whose prompt is what both dialogues begin with."""

    def turns(*said: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text} for role, text in zip(("user", "assistant"), said, strict=True)]

    rows = [{"chosen": turns(asked, good), "rejected": turns(asked, bad)} for asked, good, bad in questions()]
    path = write_rows(directory / "dialogues.jsonl", rows)
    return f"data: {{demonstrations: {path}, comparisons: {path}}}\n"


def completions_in_parquet(directory: Path) -> str:
    """TRL's prompt and completion."""
    rows = [{"prompt": asked, "completion": good} for asked, good, _ in questions()]
    pq.write_table(pa.Table.from_pylist(rows), directory / "completions.parquet")
    return f"data: {{demonstrations: {directory}/completions.parquet}}\n" + _LEARNT


def alpaca(directory: Path) -> str:
    """One JSON array, some of whose rows have an input."""
    rows = [
        {"instruction": asked, "input": "Be brief." if i % 3 else "", "output": good}
        for i, (asked, good, _) in enumerate(questions())
    ]
    (directory / "alpaca.json").write_text(json.dumps(rows), encoding="utf-8")
    return f"data: {{demonstrations: {directory}/alpaca.json}}\n" + _LEARNT


def sharegpt(directory: Path) -> str:
    """Compressed dialogues of two rounds."""
    rows = [
        {
            "conversations": [
                {"from": "human", "value": asked},
                {"from": "gpt", "value": good},
                {"from": "human", "value": "And why?"},
                {"from": "gpt", "value": f"Because. {good}"},
            ]
        }
        for asked, good, _ in questions()
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (directory / "sharegpt.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    return f"data: {{demonstrations: {directory}/sharegpt.jsonl.gz}}\n" + _LEARNT


def labelled_and_prompts(directory: Path) -> str:
    """Answers with a thumb up or down for `dpo`, and prompts without an answer for `rl`, whose reward is a function."""
    rows = [
        {"prompt": asked, "completion": answer, "label": answer == good}
        for asked, good, bad in questions()
        for answer in (good, bad)
    ]
    path = write_rows(directory / "thumbs.jsonl", rows)
    asked = [f"Tell me of {what} {where}." for what in _WHAT for where in _WHERE]
    (directory / "prompts.tsv").write_text("prompt\n" + "\n".join(asked) + "\n", encoding="utf-8")
    reward = directory / "brief.py"
    reward.write_text("def score(responses, **_):\n    return [-len(response) / 100 for response in responses]\n")
    return (
        f"data: {{demonstrations: {path}, comparisons: {path}, prompts: {directory}/prompts.tsv}}\n"
        f"stages: [sft, dpo, rl, evaluate]\n"
        f"dpo: {{loss: kto}}\n"
        f"rewards: [{{kind: python, name: brief, path: '{reward}:score'}}]\n"
    )


DATA_SETS: dict[str, Callable[[Path], str]] = {
    "csv": preferences_in_csv,
    "dialogues": implicit_dialogues,
    "parquet": completions_in_parquet,
    "alpaca": alpaca,
    "sharegpt": sharegpt,
    "labelled": labelled_and_prompts,
}

# ---- families

_SIZE: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
_QWEN_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_LLAMA_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


def opt(directory: Path) -> None:
    """Bytes in pairs; one token is BOS and EOS, and stands before every text. No chat template."""
    tokenizer = _bytes(["<pad>", "</s>", "<unk>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 1)])
    _save(
        directory, tokenizer, lambda size: OPTConfig(**_SIZE, ffn_dim=128, word_embed_proj_dim=64, vocab_size=size),
        bos_token="</s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
    )  # fmt: skip


def llama(directory: Path) -> None:
    """Words whose space is part of them, with bytes for what is unknown; a space before every text; no PAD."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(?=▁)"), "isolated")  # only while it is trained
    _train(tokenizer, ["<unk>", "<s>", "</s>"])
    tokenizer.pre_tokenizer = None
    tree = json.loads(tokenizer.to_str())
    vocabulary = tree["model"]["vocab"]
    vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
    tokenizer = Tokenizer.from_str(json.dumps(tree))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    _save(
        directory,
        tokenizer,
        lambda size: LlamaConfig(**_SIZE, intermediate_size=128, num_key_value_heads=1, vocab_size=size),
        bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=_LLAMA_TEMPLATE,
    )  # fmt: skip


def qwen(directory: Path) -> None:
    """Bytes in pairs, no BOS; a turn ends with another token than a text; more rows than tokens."""
    tokenizer = _bytes(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    _save(
        directory,
        tokenizer,
        lambda size: Qwen3Config(
            **_SIZE, intermediate_size=128, num_key_value_heads=1, head_dim=32, vocab_size=size + 29,
            tie_word_embeddings=True,
        ),
        eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=_QWEN_TEMPLATE,
    )  # fmt: skip
    generation = {"eos_token_id": [2, 0], "temperature": 0.6, "top_p": 0.95, "do_sample": True}
    (directory / "generation_config.json").write_text(json.dumps(generation))


def gpt_neox(directory: Path) -> None:
    """Bytes in pairs, one token for BOS, EOS and what is unknown, but none stands before a text; PAD is not named."""
    tokenizer = _bytes(["<|endoftext|>", "<|padding|>"])
    _save(
        directory, tokenizer, lambda size: GPTNeoXConfig(**_SIZE, intermediate_size=128, vocab_size=size),
        bos_token="<|endoftext|>", eos_token="<|endoftext|>", unk_token="<|endoftext|>",
    )  # fmt: skip


FAMILIES: dict[str, Callable[[Path], None]] = {"opt": opt, "llama": llama, "qwen": qwen, "gpt-neox": gpt_neox}


def _bytes(special: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    _train(tokenizer, special, pre_tokenizers.ByteLevel.alphabet())
    return tokenizer


def _train(tokenizer: Tokenizer, special: list[str], alphabet: list[str] | None = None) -> None:
    texts = [text for row in questions() for text in row]
    trainer = trainers.BpeTrainer(
        vocab_size=len(special) + 512, special_tokens=[AddedToken(token, special=True) for token in special],
        initial_alphabet=alphabet or [], show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)


def _save(directory: Path, tokenizer: Tokenizer, config: Callable[[int], PreTrainedConfig], **special: str) -> None:
    template = special.pop("chat_template", None)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.chat_template = template
    fast.save_pretrained(directory)
    own = config(len(fast))
    for name in ("bos", "eos", "pad"):
        setattr(own, f"{name}_token_id", getattr(fast, f"{name}_token_id"))
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(own).save_pretrained(directory)
