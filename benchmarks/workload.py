"""The model and the data of all benchmarks: what ships with the package, so that anyone can run them."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np

from rayrlhf.config_data import DataConfig
from rayrlhf.data.prompts import EncodedPrompt
from rayrlhf.data.records import Demonstration
from rayrlhf.data.sources import read_demonstrations
from rayrlhf.data.tokens import encode_prompts
from rayrlhf.models.loading import load_reward_model, load_tokenizer, resolve_model
from rayrlhf.models.saving import save_model

MODEL = resolve_model("embedded:opt-tiny")
THREADS = 2
CONTEXT = 1024
RESPONSE = 48
"""Tokens of every response: sampling never stops early, so that both sides do the same work."""
Lengths = Literal["equal", "capped", "uncapped"]
EQUAL, CAP = 128, 512
_LIMITS = {"equal": CONTEXT - RESPONSE, "capped": CAP, "uncapped": CONTEXT - RESPONSE}


@cache
def demonstrations(max_prompt_tokens: int) -> list[Demonstration]:
    return read_demonstrations(DataConfig().demonstrations, "train", load_tokenizer(MODEL), max_prompt_tokens)


@cache
def prompts(lengths: Lengths) -> list[EncodedPrompt]:
    """All embedded training posts as prompts: `equal` ones are the first 128 tokens of longer posts, `capped` ones are
    cut at 512 tokens as the published settings do, `uncapped` ones only where the model's positions end."""
    records = demonstrations(_LIMITS[lengths])
    encoded = encode_prompts(load_tokenizer(MODEL), [record.prompt for record in records])
    found = [EncodedPrompt(record.id, tuple(ids)) for record, ids in zip(records, encoded, strict=True)]
    if lengths == "equal":
        return [EncodedPrompt(prompt.id, prompt.ids[:EQUAL]) for prompt in found if len(prompt.ids) >= EQUAL]
    return found


def draw(lengths: Lengths, count: int, turn: int) -> list[EncodedPrompt]:
    """The prompts of a turn: a random choice, the same for all contestants."""
    found = prompts(lengths)
    return [found[i] for i in np.random.default_rng([turn, count]).choice(len(found), count, replace=False)]


def lengths_text(lengths: Lengths, count: int, turns: int) -> str:
    """Mean and longest prompt of the turns' draws."""
    drawn = [[len(prompt.ids) for prompt in draw(lengths, count, turn)] for turn in range(turns)]
    mean = np.mean([np.mean(each) for each in drawn])
    return f"{mean:.0f} tokens on average, longest of a step {', '.join(str(max(each)) for each in drawn)}"


def write_reward_model(directory: Path) -> str:
    """The embedded model with a fresh scalar head: scores and values start from it."""
    save_model(load_reward_model(MODEL, fresh_head_seed=0), load_tokenizer(MODEL), directory)
    return str(directory)
