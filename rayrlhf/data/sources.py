"""From a data set to typed records: reading, validation, ids, deduplication, templates and cutting.

A record's id is the row's own `id`, or else a hash of its whole text. Splits are made of ids, and neither kind of id
depends on the tokenizer or on a token limit. So the splits stay the same when those change.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, TypeVar

from rayrlhf.config import DatasetConfig
from rayrlhf.data.comparisons import usable_answers
from rayrlhf.data.formats import FORMATS, Format, RawComparison, RawDemonstration, RawLabelled, SkipRow
from rayrlhf.data.loading import SourceRow, Split, load_source
from rayrlhf.data.records import Comparison, Demonstration, LabelledAnswer, Prompt
from rayrlhf.data.splits import hash_fraction
from rayrlhf.data.template import cleaner, fit_prompts
from rayrlhf.data.tokens import special_text_remover
from rayrlhf.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CARVED_SHARE = 0.1
"""Share of the prompts that becomes the validation split if a source has none."""

_log = logging.getLogger(__name__)
Raw = TypeVar("Raw", RawDemonstration, RawComparison, RawLabelled)


def read_demonstrations(
    source: DatasetConfig, split: Split, tokenizer: PreTrainedTokenizerBase, max_prompt_tokens: int
) -> list[Demonstration]:
    """Read the demonstrations of one split. Prompts are rendered and cut to `max_prompt_tokens`, BOS included.

    If the source has no validation split, as a single file has none, "valid" is 10 % of its prompts, chosen by a hash
    of the prompt, and "train" is the rest. "all" is the whole training split, for a file that only evaluates.
    A warning counts the rows that were dropped.

    Raises:
        UserError: the source is missing, empty or malformed; the message names file, row and column.
    """
    adapter = _adapter(source)
    if adapter.demonstration is None:
        raise _cannot(source, "demonstrations", "demonstration")
    records, dropped = _read(source, split, adapter.demonstration)
    remove = special_text_remover(tokenizer)
    parts = list(map(cleaner(tokenizer), (raw.prompt for _, _, raw in records)))
    prompts = fit_prompts(tokenizer, parts, max_prompt_tokens, [row.where for _, row, _ in records])
    if dropped:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items()))
        _log.warning("%s, split %s: %d records; dropped: %s", source.path, split, len(records), reasons)
    return [
        Demonstration(id, prompt, _response(remove, raw.response, row), raw.title, whole.messages, raw.metadata)
        for (id, row, raw), prompt, whole in zip(records, prompts, parts, strict=True)
    ]


def read_published(
    source: DatasetConfig, split: Split, tokenizer: PreTrainedTokenizerBase, max_prompt_tokens: int
) -> tuple[list[Comparison], dict[str, int]]:
    """Read the comparisons of one split; splits are those of `read_demonstrations`.

    Answers under 5 words (`nearly_empty`) and answers equal to a better one (`identical`) are dropped. The row is
    dropped with them if fewer than two answers are left. Rows are also dropped as `duplicate`, as `in_train` already,
    and for the reasons that the format of a published data set gives.

    Returns:
        The comparisons, and the number of dropped rows by reason.

    Raises:
        UserError: the source is missing or malformed, or no comparison is left.
    """
    adapter = _adapter(source)
    if adapter.comparison is None:
        raise _cannot(source, "comparisons", "comparison")
    records, dropped = _read(source, split, adapter.comparison)
    remove, clean = special_text_remover(tokenizer), cleaner(tokenizer)
    usable: list[tuple[str, SourceRow, RawComparison]] = []
    for id, row, raw in records:
        answers = tuple(remove(response).strip() for response in raw.responses)
        kept, reasons = usable_answers(answers)
        if len(kept) < 2:
            dropped[next(iter(reasons))] += 1  # a row counts once, by its first reason
            continue
        usable.append((id, row, RawComparison(clean(raw.prompt), tuple(answers[i] for i in kept), raw.source)))
    if not usable:
        raise UserError(f"{source.path}: no usable comparison in split {split!r} (dropped: {dict(dropped)})")
    prompts = fit_prompts(
        tokenizer, [raw.prompt for _, _, raw in usable], max_prompt_tokens, [row.where for _, row, _ in usable]
    )
    comparisons = [
        Comparison(id, prompt, raw.responses, raw.source) for (id, _, raw), prompt in zip(usable, prompts, strict=True)
    ]
    return comparisons, dict(dropped)


def holds_labels(source: DatasetConfig) -> bool:
    """Whether the rows are single answers with a label, which `read_labelled` reads, and not comparisons.

    Raises:
        UserError: the format is unknown.
    """
    return _adapter(source).labelled is not None


def read_labelled(
    source: DatasetConfig, split: Split, tokenizer: PreTrainedTokenizerBase, max_prompt_tokens: int
) -> tuple[list[LabelledAnswer], dict[str, int]]:
    """Read the labelled answers of one split; splits are those of `read_demonstrations`.

    Short answers stay, unlike those of comparisons: each is judged by itself.

    Returns:
        The answers, and the number of dropped rows by reason: `duplicate`, or `in_train` already.

    Raises:
        UserError: the source is missing or malformed, or holds no labelled answers.
    """
    adapter = _adapter(source)
    if adapter.labelled is None:
        raise _cannot(source, "labelled answers", "labelled")
    records, dropped = _read(source, split, adapter.labelled)
    remove = special_text_remover(tokenizer)
    parts = list(map(cleaner(tokenizer), (raw.prompt for _, _, raw in records)))
    prompts = fit_prompts(tokenizer, parts, max_prompt_tokens, [row.where for _, row, _ in records])
    answers = [
        LabelledAnswer(id, prompt, _response(remove, raw.response, row), raw.good, raw.source)
        for (id, row, raw), prompt in zip(records, prompts, strict=True)
    ]
    return answers, dict(dropped)


def as_prompts(demonstrations: Sequence[Demonstration]) -> list[Prompt]:
    """Make prompts of demonstrations; the response becomes the prompt's reference."""
    return [Prompt(d.id, d.prompt, d.response, d.title, d.messages, d.metadata) for d in demonstrations]


def _read(
    source: DatasetConfig, split: Split, parse: Callable[[SourceRow], Raw]
) -> tuple[list[tuple[str, SourceRow, Raw]], Counter[str]]:
    loaded = load_source(source)
    dropped: Counter[str] = Counter()
    if split == "valid" and loaded.valid is not None:
        in_train = _parse(loaded.train, parse, Counter())  # counted when "train" is read, so not again here
        records = _parse(loaded.valid, parse, dropped)
        for id, (row, _) in list(records.items()):
            if id not in in_train:
                continue
            if row.id is not None:  # the owner's id names two records: that is a mistake of the file
                raise UserError(
                    f"{row.where}: id {id!r} is also in training ({in_train[id][0].where}); rename or remove one"
                )
            del records[id]
            dropped["in_train"] += 1
    else:
        records = _parse(loaded.train, parse, dropped)
        if loaded.valid is None and split != "all":
            wanted = split == "valid"
            records = {
                id: (row, raw)
                for id, (row, raw) in records.items()
                # A hash of the prompt, not of the row: no prompt may be on both sides with different answers.
                if (hash_fraction(raw.prompt.text, "carve") < CARVED_SHARE) == wanted
            }
    if not records:
        raise UserError(
            f"{source.path}: no records for split {split!r} (dropped: {dict(dropped)}); "
            "add rows, or give a directory with a train and a validation file"
        )
    return [(id, row, raw) for id, (row, raw) in records.items()], dropped


def _parse(
    rows: Sequence[SourceRow], parse: Callable[[SourceRow], Raw], dropped: Counter[str]
) -> dict[str, tuple[SourceRow, Raw]]:
    """Records by id, in the order of the rows. Of rows with identical text only the first is kept."""
    records: dict[str, tuple[SourceRow, Raw]] = {}
    texts: set[str] = set()
    for row in rows:
        try:
            raw = parse(row)
        except SkipRow as reason:
            dropped[str(reason)] += 1
            continue
        text = _text_hash(raw)
        if text in texts:
            dropped["duplicate"] += 1
            continue
        texts.add(text)
        id = row.id or text
        if id in records:
            raise UserError(
                f"{row.where}: id {id!r} was used before ({records[id][0].where}) with other text; rename one"
            )
        records[id] = (row, raw)
    return records


def _text_hash(raw: RawDemonstration | RawComparison | RawLabelled) -> str:
    text = "\x1f".join((raw.prompt.text, *raw.texts))
    # surrogatepass: half an emoji, which JSON can spell, is no UTF-8 and would otherwise end the reading.
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def _response(remove: Callable[[str], str], text: str, row: SourceRow) -> str:
    cleaned = remove(text).strip()
    if not cleaned:
        raise UserError(f"{row.where}: the response holds nothing but special tokens; fill it in or remove the row")
    return cleaned


def _adapter(source: DatasetConfig) -> Format:
    if source.format not in FORMATS:
        raise UserError(f"data format {source.format!r} is unknown; there are: {', '.join(FORMATS)}")
    return FORMATS[source.format]


def _cannot(source: DatasetConfig, what: str, kind: Literal["demonstration", "comparison", "labelled"]) -> UserError:
    able = [name for name, adapter in FORMATS.items() if getattr(adapter, kind) is not None]
    return UserError(f"data format {source.format!r} holds no {what}; those that do: {', '.join(able)}")
