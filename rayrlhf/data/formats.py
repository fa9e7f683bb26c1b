"""The meaning of each known kind of rows. Another one is a function or two and a row of `FORMATS`.

A row becomes what its use wants (`rayrlhf.data.raw`): a demonstration, a comparison, a labelled answer or a prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from rayrlhf.data import own, published
from rayrlhf.data.files import SourceRow
from rayrlhf.data.raw import Compare, Demonstrate, RawLabelled, RawPrompt, chosen
from rayrlhf.errors import UserError
from rayrlhf.wording import names, shown

Use = Literal["demonstration", "comparison", "labelled", "prompt"]

LOOKED_AT = 100
"""Rows at the beginning of a source by which its format is recognised."""


@dataclass(frozen=True)
class Format:
    """How to read a row of one kind, in up to four ways; None for those that it cannot be read in."""

    columns: str
    """What a row has, in words."""
    fits: Callable[[SourceRow], bool]
    """Whether a row looks like one of this kind."""
    demonstration: Demonstrate | None = None
    comparison: Compare | None = None
    labelled: Callable[[SourceRow], RawLabelled] | None = None
    prompt: Callable[[SourceRow], RawPrompt] | None = None

    def __post_init__(self) -> None:
        if self.prompt is None and self.demonstration is not None:
            object.__setattr__(self, "prompt", _prompt_of(self.demonstration))


def _prompt_of(demonstration: Demonstrate) -> Callable[[SourceRow], RawPrompt]:
    def prompt(row: SourceRow) -> RawPrompt:
        raw = demonstration(row)
        return RawPrompt(raw.prompt, raw.response, raw.title, raw.metadata)

    return prompt


def _has(*columns: str) -> Callable[[SourceRow], bool]:
    return lambda row: row.holds(*columns)


def _is_rendered_post(row: SourceRow) -> bool:
    prompt = row.values.get("prompt")
    return isinstance(prompt, str) and published.RENDERED_POST.fullmatch(prompt) is not None


def _is_labelled(row: SourceRow) -> bool:
    return own.verdict(row.values.get("label")) is not None and _asks(row)


def _asks(row: SourceRow) -> bool:
    return row.holds(row.first_of("prompt", *own.DIALOGUES))


def _ends_with_reply(row: SourceRow) -> bool:
    turns = row.values.get("messages")
    return isinstance(turns, list) and bool(turns) and isinstance(turns[-1], dict) and turns[-1].get("role") != "user"


def _is_answered(row: SourceRow) -> bool:
    answered = _ends_with_reply(row) or (
        row.holds(row.first_of("prompt", "messages")) and row.holds(row.first_of(*own.RESPONSES))
    )
    return answered and not row.holds("chosen", "rejected") and not _is_labelled(row)


def _is_hh(row: SourceRow) -> bool:
    texts = [row.values.get(column) for column in ("chosen", "rejected")]
    return not _asks(row) and all(isinstance(text, str) and published.is_dialogue(text) for text in texts)


FORMATS: dict[str, Format] = {
    "tldr": Format(
        "subreddit, title, post, summary", _has("post", "summary"), published.tldr,
    ),
    "openai_summarize_tldr": Format(
        "prompt (a TL;DR post), label (its summary)",
        lambda row: _is_rendered_post(row) and isinstance(row.values.get("label"), str),
        published.openai_tldr,
    ),
    "openai_summarize_comparisons": Format(
        "prompt (a TL;DR post), chosen, rejected",
        lambda row: _is_rendered_post(row) and row.holds("chosen", "rejected"),
        comparison=published.openai_comparison,
    ),
    "hh_rlhf": Format(
        "chosen, rejected (whole dialogues of Human and Assistant)", _is_hh,
        chosen(published.hh_comparison), published.hh_comparison,
    ),
    "shp": Format(
        "history, human_ref_A, human_ref_B, labels", _has("history", "human_ref_A", "human_ref_B", "labels"),
        chosen(published.shp_comparison), published.shp_comparison,
    ),
    "unpaired": Format(
        "prompt or messages, completion, label", _is_labelled,
        own.good_answer, labelled=own.labelled, prompt=own.unlabelled_prompt,
    ),
    "prompts": Format(
        "prompt or messages, response", _is_answered,
        own.demonstration, own.comparison, prompt=own.prompt_only,
    ),
    "alpaca": Format(
        "instruction, input, output", _has("instruction", "output"), own.alpaca, prompt=own.alpaca_prompt,
    ),
    "sharegpt": Format(
        "conversations", _has("conversations"), own.sharegpt, prompt=own.sharegpt_prompt,
    ),
    "preferences": Format(
        "prompt or messages, chosen, rejected; chosen, rejected with a common beginning; or prompt, responses",
        lambda row: row.holds("chosen", "rejected") or (_asks(row) and row.holds("responses")),
        chosen(own.comparison), own.comparison,
    ),
    "prompt_only": Format(
        "prompt or messages", _asks, prompt=own.prompt_only,
    ),
}  # fmt: skip
"""By its key in the config. Where several fit a source, the first one is taken."""

_RIVALS = ("prompts", "alpaca", "sharegpt")
"""Formats of which no two may fit: each takes the answer from other columns."""

_COLUMNS = {
    "id", "prompt", "messages", "conversations", "system", "history", "response", "completion", "reference", "chosen",
    "rejected", "responses", "ranking", "scores", "label", "labels", "source", "instruction", "input", "output",
    "subreddit", "title", "post", "summary", "human_ref_A", "human_ref_B", "domain",
}  # fmt: skip

_USUAL = {
    "prompt": ("question", "query", "instruction", "input", "user", "text"),
    "response": ("answer", "output", "reply", "assistant", "target"),
    "chosen": ("better", "preferred", "accepted", "winner"),
    "rejected": ("worse", "dispreferred", "loser"),
}
"""How other people name our columns."""


def format_named(name: str) -> Format:
    """
    Raises:
        UserError: there is no such format.
    """
    if name not in FORMATS:
        raise UserError(f"data format {name!r} is unknown; there are: {', '.join(FORMATS)}")
    return FORMATS[name]


def recognise(path: str, rows: Sequence[SourceRow], uses: Sequence[Use]) -> str:
    """The format of a source by its first rows.

    Args:
        path: names the source in errors.
        rows: the first ones.
        uses: what the source is for; a format has to serve one of these.

    Raises:
        UserError: no format fits most of the rows, or two that contradict each other do.
    """
    there_are = f"its columns are: {names(columns_of(rows))}"
    able = {name: each for name, each in FORMATS.items() if any(getattr(each, use) for use in uses)}
    if not {"demonstration", "prompt"} & {*uses}:
        able.pop("prompts", None)  # which fits rows with an answer; its comparisons are those of `preferences`
    fitting = [name for name, each in able.items() if 2 * sum(map(each.fits, rows)) > len(rows)]
    rivals = [name for name in fitting if name in _RIVALS]
    if len(rivals) > 1:
        raise UserError(f"{path}: the format may be {' or '.join(rivals)} ({there_are}); set format")
    if not fitting:
        raise UserError(
            f"{path}: the format is not recognised, {there_are}; say which of them are ours, such as "
            f"columns: {{{_likely(rows)}}}, or set format to one of these: {names(able)}"
        )
    return fitting[0]


def _likely(rows: Sequence[SourceRow]) -> str:
    """Our names of columns and the file's, in words, as far as the file's names suggest them; else an example."""
    there = {column.lower(): column for column in columns_of(rows)}
    likely = {ours: next((there[name] for name in names if name in there), None) for ours, names in _USUAL.items()}
    found = {ours: theirs for ours, theirs in likely.items() if theirs is not None and ours not in there}
    return names(f"{ours}: {theirs}" for ours, theirs in (found or {"prompt": "question"}).items())


def columns_of(rows: Sequence[SourceRow]) -> list[str]:
    """The columns that hold something in one of the rows."""
    return list(dict.fromkeys(column for row in rows for column in row.values if row.holds(column)))


def check_columns(path: str, columns: dict[str, str], rows: Sequence[SourceRow]) -> None:
    """Check the config's names of columns against a source's first rows.

    Raises:
        UserError: there is no such column, among ours or in the rows.
    """
    found = list(dict.fromkeys(column for row in rows for column in row.values))
    for ours, theirs in columns.items():
        if ours not in _COLUMNS:
            raise UserError(
                f"{path}: columns: no format has a column {shown(ours)}; there are: {names(sorted(_COLUMNS))}"
            )
        if theirs not in found:
            raise UserError(f"{path}: columns: the file has no column {shown(theirs)}; there are: {names(found)}")


def renamed(row: SourceRow, columns: dict[str, str]) -> SourceRow:
    """The row with our names of columns."""
    others = row.other_than(*columns, *columns.values())
    given = {ours: row.values[theirs] for ours, theirs in columns.items() if theirs in row.values}
    return replace(row, values={**given, **others})
