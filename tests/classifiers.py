"""Tiny random reward models of several sorts, each with a vocabulary of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
)

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "<s>", "</s>", "<u>", "<a>"]
SAID = "a cat slept no dog barked at What And then ? once upon time Human Assistant : Be kind ."
WORDS = [*SPECIAL, *SAID.split()]
SIZES: dict[str, Any] = {
    "vocab_size": len(WORDS), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 40, "num_labels": 1,
}  # fmt: skip
TEMPLATE = (
    "<s>{% for m in messages %}{% if m.role == 'system' and loop.index0 %}{{ raise_exception('late') }}{% endif %}"
    "{{ {'user': '<u> ', 'assistant': '<a> ', 'system': '. '}[m.role] + m.content + ' </s> ' }}{% endfor %}"
)


def write_tokenizer(directory: Path, **settings: Any) -> None:
    """Words as tokens; with a template they are a chat model's, otherwise [CLS] and [SEP] enclose a text."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", **settings).save_pretrained(directory)


@dataclass(frozen=True)
class Kind:
    """One sort of reward model."""

    config: Callable[[], Any]
    tokenizer: dict[str, Any]
    pad_token_id: int | None
    texts: str = "plain"


BERT = Kind(lambda: BertConfig(**SIZES), {"pad_token": "[PAD]"}, 0)
ROBERTA = Kind(lambda: RobertaConfig(**SIZES), {"pad_token": "[PAD]"}, 0)
GPT2 = Kind(
    lambda: GPT2Config(vocab_size=len(WORDS), n_embd=16, n_layer=2, n_head=2, n_positions=40, num_labels=1),
    {"eos_token": "[SEP]"},  # which ends every text, and is no padding
    None,
)
CHAT_LLAMA = Kind(lambda: LlamaConfig(**SIZES), {"eos_token": "</s>", "chat_template": TEMPLATE}, None, "chat")
PADDED_LLAMA = Kind(
    lambda: LlamaConfig(**SIZES),
    {"eos_token": "</s>", "pad_token": "</s>", "chat_template": TEMPLATE},
    5,  # its owner reads the token before the last EOS
    "chat",
)
KINDS = {"bert": BERT, "roberta": ROBERTA, "gpt2": GPT2, "chat llama": CHAT_LLAMA, "padded llama": PADDED_LLAMA}


def write(directory: Path, kind: Kind, auto: Any = AutoModelForSequenceClassification, **changes: Any) -> Path:
    """A random model of this kind with its own tokenizer; every token has a large part in the score."""
    config = kind.config()
    config.update({"pad_token_id": kind.pad_token_id, **changes})
    torch.manual_seed(0)
    model = auto.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.4)
    model.save_pretrained(directory)
    write_tokenizer(directory, **kind.tokenizer)
    return directory
