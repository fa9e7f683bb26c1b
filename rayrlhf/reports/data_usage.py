"""What a run's data is used for: records by split and use, lengths in tokens, prompts in two uses, examples."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from rayrlhf.config import Config
from rayrlhf.data.comparisons import Answers
from rayrlhf.data.records import Prompt
from rayrlhf.data.run_data import RunData
from rayrlhf.reports.progress import in_lines

_NO_LIMIT = 10**9

Ids = Sequence[int]


@dataclass(frozen=True)
class Usage:
    """The records that are used alike, as token ids before anything is cut."""

    kind: str
    use: str
    prompts: list[Ids]
    """One for each record."""
    responses: list[Ids]
    """All of all records."""


def usages(config: Config, tokenizer: PreTrainedTokenizerBase, kinds: Sequence[str]) -> list[Usage]:
    """The uses of these kinds of records in a run; those without a record are left out."""
    limits = {"max_prompt_tokens": _NO_LIMIT, "max_response_tokens": _NO_LIMIT}
    data = RunData(
        config.model_copy(update={"data": config.data.model_copy(update=limits)}), tokenizer, lambda line: None
    )
    found = []
    if "demonstrations" in kinds:
        splits, unused = data.train, data.unused
        rest = [] if unused else splits.rl
        shares: dict[str, Sequence[Prompt]] = {
            "sft": splits.sft, "reward_model": splits.reward_model, "rl": rest, "no stage": unused, "dev": data.dev,
            "test": data.test,
        }  # fmt: skip
        found += [_of_records(data, "demonstrations", use, records) for use, records in shares.items()]
    if "prompts" in kinds:
        shares = {"rl": data.rl, "evaluate": data.evaluated}
        found += [_of_records(data, "prompts", use, records) for use, records in shares.items()]
    if "comparisons" in kinds:
        sides = {"train": False, "held out": True}
        found += [
            _of_answers("comparisons", use, [each for each in data.comparisons if each.heldout is heldout])
            for use, heldout in sides.items()
        ]
    return [usage for usage in found if usage.prompts]


def _of_records(data: RunData, kind: str, use: str, records: Sequence[Prompt]) -> Usage:
    answered = [record for record in records if record.reference is not None]
    return Usage(kind, use, [prompt.ids for prompt in data.prompts(records)], [*data.responses(answered)])


def _of_answers(kind: str, use: str, answers: Sequence[Answers]) -> Usage:
    return Usage(
        kind, use, [each.prompt_ids for each in answers], [ids for each in answers for ids in each.response_ids]
    )


def usage_table(config: Config, found: Sequence[Usage]) -> Table:
    """A row for each use: its records, its different prompts, lengths, and how many exceed the limits."""
    limits = config.data.max_prompt_tokens, config.data.max_response_tokens
    table = Table(
        title="data by use",
        caption="Tokens before the cut: median / 95 % / longest. A prompt counts its BOS, a response its EOS. "
        f"Longer than data.max_prompt_tokens={limits[0]} or data.max_response_tokens={limits[1]}: cut.",
        caption_justify="left",
        title_justify="left",
    )
    for heading in ("records", "use"):
        table.add_column(heading)
    for heading in ("number", "prompts", "prompt tokens", "cut", "responses", "response tokens", "cut"):
        table.add_column(heading, justify="right")
    for usage in found:
        cells = [f"{len(usage.prompts):,}", f"{len({tuple(ids) for ids in usage.prompts}):,}"]
        for texts, limit in zip((usage.prompts, usage.responses), limits, strict=True):
            if texts is usage.responses:
                cells.append(f"{len(texts):,}")
            lengths = np.array([len(ids) for ids in texts])
            cells += [_lengths(lengths), f"{int((lengths > limit).sum()):,}"]
        table.add_row(usage.kind, usage.use, *cells)
    return table


def _lengths(lengths: np.ndarray) -> str:
    if not len(lengths):
        return "–"
    return " / ".join(f"{round(float(np.quantile(lengths, share, method='higher'))):,}" for share in (0.5, 0.95, 1))


def shared_prompts(found: Sequence[Usage]) -> list[str]:
    """A line for each two uses that have prompts in common."""
    prompts = [{tuple(ids) for ids in usage.prompts} for usage in found]
    names = [f"{usage.use} ({usage.kind})" for usage in found]
    return [
        f"{len(prompts[i] & prompts[j])} prompts are in {names[i]} and in {names[j]}"
        for i, j in itertools.combinations(range(len(found)), 2)
        if prompts[i] & prompts[j]
    ]


def example_panels(tokenizer: PreTrainedTokenizerBase, found: Sequence[Usage]) -> list[Panel]:
    """The first record of each kind as the model sees it, special tokens included, with its first response."""
    panels = []
    for kind in dict.fromkeys(usage.kind for usage in found):
        usage = next(each for each in found if each.kind == kind)
        text = in_lines(str(tokenizer.decode(list(usage.prompts[0]))))
        if usage.responses:
            text.append(str(tokenizer.decode(list(usage.responses[0]))), "bold green")
        text.highlight_words(tokenizer.all_special_tokens, "reverse")
        title = f"{kind}, {usage.use}: first prompt" + (" and response" if usage.responses else "")
        panels.append(Panel(text, title=Text(title), title_align="left"))
    return panels
