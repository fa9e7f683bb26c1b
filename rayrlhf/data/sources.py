"""From sources to typed records: special tokens taken out, prompts rendered and cut."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from jinja2 import TemplateError

from rayrlhf.config_data import DatasetConfig
from rayrlhf.data.comparisons import usable_answers
from rayrlhf.data.formats import Use
from rayrlhf.data.loading import Split
from rayrlhf.data.raw import RawComparison, RawDemonstration, RawLabelled, RawPrompt, SkipRow
from rayrlhf.data.reading import Reading, Record
from rayrlhf.data.records import Comparison, Demonstration, LabelledAnswer, Prompt
from rayrlhf.data.template import Fitted, PromptParts, cleaner, fit_prompts, told_first
from rayrlhf.data.tokens import special_text_remover
from rayrlhf.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

R = TypeVar("R")
P = TypeVar("P", bound=Prompt)


@dataclass(frozen=True)
class Rendering:
    """How prompts become texts."""

    tokenizer: PreTrainedTokenizerBase
    max_prompt_tokens: int
    system_prompt: str | None = None


@dataclass(frozen=True)
class Found(Generic[R]):
    """The records of a split, and what became of the rows that are none."""

    records: list[R]
    dropped: dict[str, int]
    """Rows by the reason for which they were dropped."""
    mended: int = 0
    """Rows in which U+FFFD stands for what was no character."""
    cleared: int = 0
    """Records that lost texts which only the tokenizer and its template may write."""


class DataSet:
    """One or several sources of one kind of records, as texts for a model."""

    def __init__(self, sources: Sequence[DatasetConfig], rendering: Rendering, *uses: Use) -> None:
        """Open the sources; see `Reading`."""
        self.reading, self.rendering = Reading(sources, *uses), rendering

    @property
    def remarks(self) -> list[str]:
        """What was recognised in the sources, and what of them is not used: one line each."""
        sources = self.reading.sources
        return [
            f"{source.config.path}: read as {source.name} ({source.format.columns})"
            for source in sources
            if source.config.format is None
        ] + [
            f"{source.config.path}: splits that are not used: {', '.join(source.rows.unused)}"
            for source in sources
            if source.rows.unused
        ]

    def demonstrations(self, split: Split) -> Found[Demonstration]:
        """The demonstrations of a split.

        Raises:
            UserError: a file or a row cannot be read, or no record is left; the message names file, row and column.
        """

        def make(record: Record, raw: RawDemonstration, fitted: Fitted) -> Demonstration:
            return Demonstration(
                record.id, fitted.text, _response(record, raw.response), raw.title, raw.prompt.messages, raw.metadata,
                fitted.tokens, record.group,
            )  # fmt: skip

        def clean(raw: RawDemonstration, remove: Callable[[str], str]) -> RawDemonstration:
            return replace(raw, response=remove(raw.response))

        return self._made(split, clean, make)

    def prompts(self, split: Split) -> Found[Prompt]:
        """The prompts of a split. See `demonstrations` for errors."""

        def make(record: Record, raw: RawPrompt, fitted: Fitted) -> Prompt:
            return Prompt(
                record.id, fitted.text, raw.reference, raw.title, raw.prompt.messages, raw.metadata, fitted.tokens,
                record.group,
            )  # fmt: skip

        def clean(raw: RawPrompt, remove: Callable[[str], str]) -> RawPrompt:
            reference = remove(raw.reference).strip() or None if raw.reference else None
            return replace(raw, reference=reference)

        return self._made(split, clean, make)

    def comparisons(self, split: Split) -> Found[Comparison]:
        """The comparisons of a split.

        Answers of less than a few words (`nearly_empty`) and answers equal to a better one (`identical`) are dropped.
        The row is dropped with them if fewer than two answers are left. See `demonstrations` for errors.
        """

        def make(record: Record, raw: RawComparison, fitted: Fitted) -> Comparison:
            return Comparison(record.id, fitted.text, raw.responses, raw.source, raw.scores, fitted.tokens)

        def clean(raw: RawComparison, remove: Callable[[str], str]) -> RawComparison:
            answers = tuple(remove(response).strip() for response in raw.responses)
            kept, reasons = usable_answers(answers)
            scores = raw.scores and tuple(raw.scores[i] for i in kept)
            if len(kept) < 2:
                raise SkipRow(next(iter(reasons)))  # a row counts once, by its first reason
            return replace(raw, responses=tuple(answers[i] for i in kept), scores=scores)

        return self._made(split, clean, make)

    def labelled(self, split: Split) -> Found[LabelledAnswer]:
        """The labelled answers of a split; short ones stay, since each is judged by itself. See `demonstrations`."""

        def make(record: Record, raw: RawLabelled, fitted: Fitted) -> LabelledAnswer:
            return LabelledAnswer(
                record.id, fitted.text, _response(record, raw.response), raw.good, raw.source, fitted.tokens
            )

        def clean(raw: RawLabelled, remove: Callable[[str], str]) -> RawLabelled:
            return replace(raw, response=remove(raw.response))

        return self._made(split, clean, make)

    def _made(
        self,
        split: Split,
        clean: Callable[[Any, Callable[[str], str]], Any],
        make: Callable[[Any, Any, Fitted], R],
    ) -> Found[R]:
        """The records of a split: special tokens taken out, prompts rendered and cut."""
        records, counted, mended = self.reading.split(split)
        dropped = Counter(counted)
        remove, cleaned = special_text_remover(self.rendering.tokenizer), cleaner(self.rendering.tokenizer)
        kept: list[tuple[Record, Any]] = []
        cleared = 0
        for record in records:
            try:
                raw = clean(replace(record.raw, prompt=cleaned(record.raw.prompt)), remove)
                if raw.prompt.blank:  # now that special tokens are out
                    raise SkipRow("empty_prompt")
            except SkipRow as reason:
                dropped[str(reason)] += 1
                continue
            cleared += raw.prompt != record.raw.prompt or any(remove(text) != text for text in record.raw.texts)
            kept.append((record, raw))
        if not kept:
            raise UserError(
                f"{self.reading.paths}: no usable {self.reading.use} in split {split!r} (dropped: {dict(dropped)}); "
                "add rows, or give a directory with a train and a validation file"
            )
        prompts = [self._told(record.where, raw.prompt) for record, raw in kept]
        own = self.rendering
        fitted = fit_prompts(own.tokenizer, prompts, own.max_prompt_tokens, [record.where for record, _ in kept])
        made = [make(record, raw, each) for (record, raw), each in zip(kept, fitted, strict=True)]
        return Found(made, dict(dropped), mended, cleared)

    def _told(self, where: str, prompt: PromptParts) -> PromptParts:
        own = self.rendering
        if own.system_prompt is None:
            return prompt
        try:
            return told_first(own.tokenizer, own.system_prompt, prompt)
        except TemplateError as error:
            raise UserError(f"{where}: the tokenizer's chat template refuses data.system_prompt: {error}") from None


def read_demonstrations(
    sources: Sequence[DatasetConfig], split: Split, tokenizer: PreTrainedTokenizerBase, max_prompt_tokens: int
) -> list[Demonstration]:
    """The demonstrations of one split of these sources; see `DataSet` and `Reading`."""
    rendering = Rendering(tokenizer, max_prompt_tokens)
    return DataSet(sources, rendering, "demonstration").demonstrations(split).records


def one_each(records: Sequence[P]) -> list[P]:
    """Of the records of one prompt the first."""
    first: dict[str, P] = {}
    for record in records:
        first.setdefault(record.split_key, record)
    return list(first.values())


def _response(record: Record, text: str) -> str:
    if not text.strip():
        raise UserError(f"{record.where}: the response holds nothing but special tokens; fill it in or remove the row")
    return text.strip()
