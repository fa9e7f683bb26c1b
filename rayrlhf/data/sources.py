"""From sources to typed records: special tokens taken out, prompts rendered and cut."""

from __future__ import annotations

import itertools
import pickle
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from jinja2 import TemplateError

from rayrlhf.config_data import DatasetConfig
from rayrlhf.data import cache
from rayrlhf.data.comparisons import usable_answers
from rayrlhf.data.formats import Use
from rayrlhf.data.loading import Split
from rayrlhf.data.raw import RawComparison, RawDemonstration, RawLabelled, RawPrompt, SkipRow
from rayrlhf.data.reading import Reading, Record
from rayrlhf.data.records import Comparison, Demonstration, LabelledAnswer, Prompt
from rayrlhf.data.stored import Key, R, Records, write_records
from rayrlhf.data.template import Fitted, PromptParts, check_fast, cleaner, fit_prompts, told_first
from rayrlhf.data.tokens import encode_responses, special_text_remover
from rayrlhf.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

P = TypeVar("P", bound=Prompt)
NO_LIMIT = 10**9
"""A `max_prompt_tokens` that cuts no prompt: what `rayrlhf.data.lengths` reads, to choose one."""
_CHUNK = 1024  # records that are made at a time


@dataclass(frozen=True)
class Rendering:
    """How prompts become texts."""

    tokenizer: PreTrainedTokenizerBase
    max_prompt_tokens: int
    system_prompt: str | None = None


@dataclass(kw_only=True)
class Facts:
    """What became of the rows of a split."""

    dropped: dict[str, int]
    """Rows by the reason for which they were dropped."""
    mended: int = 0
    """Rows in which U+FFFD stands for what was no character."""
    odd: int = 0
    """Rows in which a text stands for a value that Python has not."""
    cleared: int = 0
    """Records that lost texts which only the tokenizer and its template may write."""
    longer: int = 0
    """Records whose prompt was cut."""


@dataclass(kw_only=True)
class Found(Facts, Generic[R]):
    """The records of a split, and what became of the rows that are none."""

    records: Records[R]
    cached: bool = False
    """Whether they were tokenised at an earlier start."""


class DataSet:
    """One or several sources of one kind of records, as texts for a model."""

    def __init__(self, sources: Sequence[DatasetConfig], rendering: Rendering, *uses: Use) -> None:
        """Open the sources; see `Reading`."""
        self.reading, self.rendering = Reading(sources, *uses), rendering

    @property
    def remarks(self) -> list[str]:
        """What was recognised in the sources, and what of them is not used: one line each."""
        sources = self.reading.sources
        return (
            [
                f"{source.config.path}: read as {source.name} ({source.format.columns})"
                for source in sources
                if source.config.format is None
            ]
            + [
                f"{source.config.path}: splits that are not used: {', '.join(source.rows.unused)}"
                for source in sources
                if source.rows.unused
            ]
            + [
                f"{source.config.path}: files that are not read, as they are of no split or of another kind than the "
                f"others: {', '.join(source.rows.left_out)}"
                for source in sources
                if source.rows.left_out
            ]
        )

    def demonstrations(self, split: Split) -> Found[Demonstration]:
        """The demonstrations of a split.

        Raises:
            UserError: a file or a row cannot be read, or no record is left; the message names file, row and column.
        """

        def make(record: Record, raw: RawDemonstration, fitted: Fitted) -> Demonstration:
            return Demonstration(
                record.id, fitted.text, _response(record, raw.response), raw.title, raw.prompt.messages, raw.metadata,
                fitted.tokens, record.group, fitted.ids,
            )  # fmt: skip

        def clean(raw: RawDemonstration, remove: Callable[[str], str]) -> RawDemonstration:
            return replace(raw, response=remove(raw.response))

        return self._found(Demonstration, split, clean, make)

    def prompts(self, split: Split) -> Found[Prompt]:
        """The prompts of a split. See `demonstrations` for errors."""

        def make(record: Record, raw: RawPrompt, fitted: Fitted) -> Prompt:
            return Prompt(
                record.id, fitted.text, raw.reference, raw.title, raw.prompt.messages, raw.metadata, fitted.tokens,
                record.group, fitted.ids,
            )  # fmt: skip

        def clean(raw: RawPrompt, remove: Callable[[str], str]) -> RawPrompt:
            reference = remove(raw.reference).strip() or None if raw.reference else None
            return replace(raw, reference=reference)

        return self._found(Prompt, split, clean, make)

    def comparisons(self, split: Split) -> Found[Comparison]:
        """The comparisons of a split.

        Answers of less than a few words (`nearly_empty`) and answers equal to a better one (`identical`) are dropped.
        The row is dropped with them if fewer than two answers are left. See `demonstrations` for errors.
        """

        def make(record: Record, raw: RawComparison, fitted: Fitted) -> Comparison:
            return Comparison(record.id, fitted.text, raw.responses, raw.source, raw.scores, *fitted[1:])

        def clean(raw: RawComparison, remove: Callable[[str], str]) -> RawComparison:
            answers = tuple(remove(response).strip() for response in raw.responses)
            kept, reasons = usable_answers(answers)
            scores = raw.scores and tuple(raw.scores[i] for i in kept)
            if len(kept) < 2:
                raise SkipRow(next(iter(reasons)))  # a row counts once, by its first reason
            return replace(raw, responses=tuple(answers[i] for i in kept), scores=scores)

        return self._found(Comparison, split, clean, make)

    def labelled(self, split: Split) -> Found[LabelledAnswer]:
        """The labelled answers of a split; short ones stay, since each is judged by itself. See `demonstrations`."""

        def make(record: Record, raw: RawLabelled, fitted: Fitted) -> LabelledAnswer:
            response = _response(record, raw.response)
            return LabelledAnswer(record.id, fitted.text, response, raw.good, raw.source, *fitted[1:])

        def clean(raw: RawLabelled, remove: Callable[[str], str]) -> RawLabelled:
            return replace(raw, response=remove(raw.response))

        return self._found(LabelledAnswer, split, clean, make)

    @cached_property
    def _content(self) -> str:
        """A hash of what decides the records of all splits, but for the limit."""
        own = self.rendering
        check_fast(own.tokenizer)
        return cache.digest(cache.tokenizer_digest(own.tokenizer), own.system_prompt, self.reading.content)

    def _key(self, kind: type[R], split: Split, max_prompt_tokens: int) -> str:
        return cache.digest(self._content, max_prompt_tokens, kind.__name__, split)

    def _found(
        self,
        kind: type[R],
        split: Split,
        clean: Callable[[Any, Callable[[str], str]], Any],
        make: Callable[[Any, Any, Fitted], R],
    ) -> Found[R]:
        """The records of a split, from the cache or made now."""
        key = self._key(kind, split, self.rendering.max_prompt_tokens)
        if kept := cache.read_entry(kind, key):
            return Found(records=kept[0], cached=True, **kept[1])
        # Those that the limit was chosen by: most of them fit it as they are.
        whole = cache.read_entry(kind, self._key(kind, split, NO_LIMIT))
        records, counted, mended, odd = self.reading.split(split)
        facts = Facts(dropped=Counter(counted), mended=mended, odd=odd)
        with cache.working_directory() as directory:
            file = directory / cache.RECORDS
            try:
                count = write_records(kind, self._made(records, facts, clean, make, whole[0] if whole else None), file)
            except pickle.UnpicklingError as error:
                raise UserError(
                    f"{self.reading.paths}: a further column has {error}, which cannot be read; leave the column out"
                ) from None
            if not count:
                raise UserError(
                    f"{self.reading.paths}: no usable {self.reading.use} in split {split!r} (dropped: "
                    f"{dict(facts.dropped)}); add rows, or give a directory with a train and a validation file"
                )
            found = Found(records=Records.open(kind, file), **vars(facts))
            if self.reading.settled and self.reading.rows >= cache.KEPT_FROM:
                cache.keep(directory, key, vars(facts))
        return found

    def _made(
        self,
        records: Sequence[Record],
        facts: Facts,
        clean: Callable[[Any, Callable[[str], str]], Any],
        make: Callable[[Any, Any, Fitted], R],
        whole: Iterable[R] | None,
    ) -> Iterator[R]:
        """Make records: special tokens taken out, prompts rendered and cut, all texts tokenised.

        `whole` has the same records without a limit, if they were made before: those that fit are taken from there.
        """
        own = self.rendering
        remove, cleaned = special_text_remover(own.tokenizer), cleaner(own.tokenizer)
        earlier = iter(whole or ())
        for start in range(0, len(records), _CHUNK):
            kept: list[tuple[Record, Any]] = []
            where: list[str] = []
            for record in records[start : start + _CHUNK]:
                place, given = record.said
                try:
                    raw = clean(replace(given, prompt=cleaned(given.prompt)), remove)
                    if raw.prompt.blank:  # now that special tokens are out
                        raise SkipRow("empty_prompt")
                except SkipRow as reason:
                    facts.dropped[str(reason)] += 1
                    continue
                if lost := len(given.texts) - len(raw.texts):  # one of several answers, and the row stays
                    facts.dropped["answers_of_kept_rows"] = facts.dropped.get("answers_of_kept_rows", 0) + lost
                facts.cleared += raw.prompt != given.prompt or any(remove(text) != text for text in given.texts)
                kept.append((record, raw))
                where.append(place)
            before = enumerate(itertools.islice(earlier, len(kept)))
            made = {i: record for i, record in before if record.tokens <= own.max_prompt_tokens}
            new = [i for i in range(len(kept)) if i not in made]
            prompts = [self._told(where[i], kept[i][1].prompt) for i in new]
            fitted = fit_prompts(own.tokenizer, prompts, own.max_prompt_tokens, [where[i] for i in new])
            facts.longer += sum(each.tokens > own.max_prompt_tokens for each in fitted)
            with_responses = self._with_responses([make(*kept[i], each) for i, each in zip(new, fitted, strict=True)])
            made |= zip(new, with_responses, strict=True)
            yield from (made[i] for i in range(len(kept)))

    def _with_responses(self, records: Sequence[R]) -> Iterator[R]:
        """The records with the token ids of their answers."""
        answers = [answer for record in records for answer in record.answers]
        prompts = [record.text for record in records for _ in record.answers]
        encoded = map(tuple, encode_responses(self.rendering.tokenizer, answers, sys.maxsize, prompts))
        for record in records:
            yield replace(record, response_ids=tuple(itertools.islice(encoded, len(record.answers))))

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
    return list(DataSet(sources, rendering, "demonstration").demonstrations(split).records)


def one_each(records: Records[P]) -> Records[P]:
    """Of the records of one prompt the first."""
    first: dict[str, Key] = {}
    for key in records.keys:
        first.setdefault(key.split_key, key)
    return records.at(first.values())


def _response(record: Record, text: str) -> str:
    if not text.strip():
        raise UserError(f"{record.where}: the response holds nothing but special tokens; fill it in or remove the row")
    return text.strip()
