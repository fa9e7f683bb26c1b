"""The rows of one or several sources as records with ids, without duplicates and in their splits.

A record's id is the row's own `id`, or else a hash of its whole text. Splits are made of ids, and neither kind of id
depends on the tokenizer or on a token limit. So the splits stay the same when those change.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from rayrlhf.config_data import DatasetConfig, paths_of
from rayrlhf.data.files import SourceRow
from rayrlhf.data.formats import FORMATS, LOOKED_AT, Format, Use, check_columns, format_named, recognise, renamed
from rayrlhf.data.loading import SourceRows, Split, load_source
from rayrlhf.data.raw import RawComparison, RawDemonstration, RawLabelled, RawPrompt, SkipRow
from rayrlhf.data.splits import hash_fraction
from rayrlhf.data.spool import Spool
from rayrlhf.errors import UserError
from rayrlhf.wording import shown

CARVED_SHARE = 0.1
"""Share of the prompts that becomes the validation split if a source has none."""

_USES: dict[Use, str] = {
    "demonstration": "demonstrations", "comparison": "comparisons", "labelled": "labelled answers", "prompt": "prompts",
}  # fmt: skip
Raw = RawPrompt | RawDemonstration | RawComparison | RawLabelled


@dataclass(frozen=True)
class Source:
    """A source whose format is known."""

    config: DatasetConfig
    rows: SourceRows
    format: Format
    name: str
    """The format's."""

    @classmethod
    def open(cls, config: DatasetConfig, *uses: Use) -> Source:
        """Find a source and its format, by its first rows if need be.

        Args:
            config: of the source.
            uses: what it is for; it has to serve one of these.

        Raises:
            UserError: there is no such source, its format is unknown or serves none of `uses`, or columns are named
                that it does not have.
        """
        named = format_named(config.format) if config.format is not None else None
        if named and not any(getattr(named, use) for use in uses):
            able = [name for name, each in FORMATS.items() if any(getattr(each, use) for use in uses)]
            raise UserError(
                f"data format {config.format!r} holds no {_USES[uses[0]]}; those that do: {', '.join(able)}"
            )
        rows = load_source(config)
        if named and not config.columns:
            return cls(config, rows, named, str(config.format))
        first = list(itertools.islice(rows.train, LOOKED_AT))
        check_columns(config.path, config.columns, first)
        if named:
            return cls(config, rows, named, str(config.format))
        name = recognise(config.path, [renamed(row, config.columns) for row in first], uses)
        return cls(config, rows, FORMATS[name], name)

    @property
    def content(self) -> list[Any]:
        """What decides its rows and what they mean: its settings, and the hashes of its files as they are now."""
        files = [None if rows is None else rows.content() for rows in (self.rows.train, self.rows.valid)]
        return [self.name, self.rows.from_hub, self.config.model_dump(exclude={"path", "format"}), *files]

    def split(self, valid: bool) -> Iterator[SourceRow]:
        """The rows of a split, with our names of columns; none if the source does not have it."""
        rows = self.rows.valid if valid else self.rows.train
        given = iter(rows) if rows is not None else iter(())
        return (renamed(row, self.config.columns) for row in given) if self.config.columns else given


@dataclass(slots=True)
class Record:
    """A row that was read. Its text waits on disk, so that memory does not grow with its length."""

    id: str
    key: str
    """What the record's split follows from, if it is the only one of its prompt."""
    own_id: bool
    source: int
    text: str
    """A hash of prompt and answers."""
    prompt: str
    """A hash of the prompt, the same for all records of it."""
    carved: bool
    """Whether the prompt goes to the validation split if its source has none."""
    spool: Spool
    place: int
    group: str | None = None

    @property
    def said(self) -> tuple[str, Any]:
        """The file and the row in words, and what the row says: one of `Raw`, by the use of the sources."""
        said: tuple[str, Raw] = self.spool[self.place]
        return said

    @property
    def where(self) -> str:
        return self.said[0]


@dataclass
class _Parsed:
    """The rows of some splits as records by id, in their order. Of rows with identical text only the first is kept."""

    spool: Spool
    records: dict[str, Record] = field(default_factory=dict)
    texts: set[str] = field(default_factory=set)
    dropped: Counter[str] = field(default_factory=Counter)
    mended: int = 0
    odd: int = 0

    def add(self, sources: Sequence[Source], use: Use, valid: bool) -> None:
        for number, source in enumerate(sources):
            parse: Callable[[SourceRow], Raw] = getattr(source.format, use)
            lenient = source.config.skip_bad_rows or source.rows.from_hub
            first_error: UserError | None = None
            before = len(self.records)
            for row in source.split(valid):
                try:
                    self._add_row(row, parse(row), number)
                except SkipRow as reason:
                    self.dropped[str(reason)] += 1
                except UserError as error:
                    if not lenient:
                        raise
                    first_error = first_error or error
                    self.dropped["malformed"] += 1
            if first_error and len(self.records) == before:  # not some rows are bad, but all are read wrongly
                raise first_error

    def _add_row(self, row: SourceRow, raw: Raw, source: int) -> None:
        text, prompt = _hash(raw.prompt.text, *raw.texts), _hash(raw.prompt.text)
        self.mended += row.mended
        self.odd += row.odd
        if text in self.texts:
            self.dropped["duplicate"] += 1
            return
        self.texts.add(text)
        key = id = row.id or text
        if (other := self.records.get(id)) is not None:
            # Several rows of a prompt may have its id, and the files of several sources may each count from 1.
            if other.source == source and other.prompt != prompt:
                raise UserError(
                    f"{row.where}: id {shown(id)} was used before ({other.where}) with another prompt; rename one"
                )
            id = f"{key}-{text}"
        carved = hash_fraction(raw.prompt.text, "carve") < CARVED_SHARE
        place = self.spool.add((row.where, raw))
        self.records[id] = Record(id, key, row.id is not None, source, text, prompt, carved, self.spool, place)


class SplitRecords(NamedTuple):
    """The records of a split, and what became of the rows that are none."""

    records: list[Record]
    dropped: Counter[str]
    mended: int
    """Rows whose characters were replaced, see `SourceRow`."""
    odd: int
    """Rows whose values are texts instead, see `SourceRow`."""


class Reading:
    """One or several sources of one kind of records. The files are read once, when a split is first asked for."""

    def __init__(self, configs: Sequence[DatasetConfig], *uses: Use) -> None:
        """Open the sources.

        Args:
            configs: of the sources.
            uses: the kind of records. If there are several, the first one is taken that all sources can serve.

        Raises:
            UserError: as `Source.open`; or the sources hold records of several kinds.
        """
        self.paths = paths_of(tuple(configs))
        self.sources = [Source.open(config, *uses) for config in configs]
        shared = [use for use in uses if all(getattr(source.format, use) for source in self.sources)]
        if not shared:
            kinds = " and ".join(_USES[use] for use in uses)
            raise UserError(f"{self.paths}: some of these hold {kinds}, which cannot be mixed")
        self.use = shared[0]
        self.rows, self.settled = 0, False
        """Once the files are read: how many rows they have, and whether their content was the same before and after."""

    @cached_property
    def content(self) -> list[Any]:
        """What decides the records, as JSON has it: the files' hashes and the settings of the sources."""
        return [self.use, *(source.content for source in self.sources)]

    def split(self, split: Split) -> SplitRecords:
        """The records of a split. "all" is the whole training split, for a file that only evaluates.

        If a source has no validation split, as a single file has none, "valid" has 10 % of its prompts, chosen by a
        hash of the prompt, and "train" the rest.

        Raises:
            UserError: a file or a row cannot be read, or an id names two prompts; the message names file, row and
                column.
        """
        return self._splits[split]

    @cached_property
    def _splits(self) -> dict[Split, SplitRecords]:
        spool = Spool()
        train, valid = _Parsed(spool), _Parsed(spool)
        train.add(self.sources, self.use, valid=False)
        valid.add(self.sources, self.use, valid=True)
        everything = list(train.records.values())
        _group(everything)
        bound = {record.prompt for record in everything if not self._carves(record)}
        carved, own = list[Record](), list[Record]()
        for record in everything:
            # A hash of the prompt, not of the row: no prompt may be on both sides with different answers.
            (carved if record.carved and record.prompt not in bound else own).append(record)
        published = self._without_training(valid, train, {record.prompt for record in own})
        _group([*carved, *published])
        own = self._drawn(own, train.dropped)
        self.rows = len(everything) + len(valid.records)
        self.settled = self.content[1:] == [source.content for source in self.sources]
        return {
            "train": SplitRecords(own, train.dropped, train.mended, train.odd),
            "valid": SplitRecords([*carved, *published], valid.dropped, valid.mended, valid.odd),
            "all": SplitRecords(everything, train.dropped, train.mended, train.odd),
        }

    def _carves(self, record: Record) -> bool:
        """Whether a record's source has no validation split, so that a share of its prompts becomes one."""
        return self.sources[record.source].rows.valid is None

    def _without_training(self, valid: _Parsed, train: _Parsed, prompts: set[str]) -> list[Record]:
        """The validation records of which neither text nor prompt are in training.

        Raises:
            UserError: an id that its owner gave names another prompt in training.
        """
        kept = []
        for record in valid.records.values():
            other = train.records.get(record.id)
            if record.text in train.texts:
                valid.dropped["in_train"] += 1
            elif record.prompt in prompts:
                valid.dropped["prompt_in_train"] += 1
            elif other is not None and record.own_id and other.source == record.source:
                raise UserError(
                    f"{record.where}: id {shown(record.id)} is also in training ({other.where}); rename or remove one"
                )
            else:
                record.id = record.id if other is None else f"{record.key}-{record.text}"
                kept.append(record)
        return kept

    def _drawn(self, records: list[Record], dropped: Counter[str]) -> list[Record]:
        """The training records that the sources' weights leave.

        They are as many as there can be in these shares: all of the source that is scarcest for its weight. Which of
        another source, a hash of the id says.
        """
        weights = [source.config.weight for source in self.sources]
        sizes = Counter(record.source for record in records)
        if None in weights or not sizes:
            return records
        unit = min(sizes[i] / weight for i, weight in enumerate(weights) if weight)
        kept: set[str] = set()
        for i, weight in enumerate(weights):
            own = [record for record in records if record.source == i]
            own.sort(key=lambda record: hash_fraction(record.group or record.key, "weight"))
            kept.update(record.id for record in own[: round(unit * (weight or 0))])
        if len(kept) < len(records):
            dropped["not_drawn"] += len(records) - len(kept)
        return [record for record in records if record.id in kept]


def _group(records: Sequence[Record]) -> None:
    """Note at records of the same prompt the smallest of their keys."""
    by_prompt: dict[str, list[Record]] = {}
    for record in records:
        by_prompt.setdefault(record.prompt, []).append(record)
    for own in by_prompt.values():
        if len(own) > 1:
            smallest = min(record.key for record in own)
            for record in own:
                record.group = smallest


def _hash(*texts: str) -> str:
    # surrogatepass: half an emoji is no UTF-8 and would otherwise end the reading.
    return hashlib.blake2b("\x1f".join(texts).encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
