"""The meaning of each known data set's columns. Another data set is a function and a row of `FORMATS`.

A row becomes a `RawDemonstration`, a `RawComparison` or a `RawLabelled`. The prompt stays in parts, because cutting
needs the tokenizer.
A bad row of a user's own file is an error. A bad row of a published data set, which nobody can mend, is skipped and
counted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rayrlhf.data.loading import SourceRow
from rayrlhf.data.records import Message
from rayrlhf.data.template import ChatPrompt, PromptParts, TextPrompt, plain_prompt, tldr_prompt
from rayrlhf.errors import UserError


class SkipRow(Exception):
    """Raised for a row of a published data set that cannot be used; the message is the reason that is counted."""


@dataclass(frozen=True)
class RawDemonstration:
    """A prompt in parts, and the response to imitate."""

    prompt: PromptParts
    response: str
    title: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """The columns that the format does not use; published data sets have none."""

    @property
    def texts(self) -> tuple[str, ...]:
        """What tells rows of the same prompt apart."""
        return (self.response,)


@dataclass(frozen=True)
class RawComparison:
    """A prompt in parts, and at least two responses, best first."""

    prompt: PromptParts
    responses: tuple[str, ...]
    source: str = ""
    """Where within the data set it comes from; the reward model's accuracy is also reported by source."""

    @property
    def texts(self) -> tuple[str, ...]:
        """As in `RawDemonstration`."""
        return self.responses


@dataclass(frozen=True)
class RawLabelled:
    """A prompt in parts, and one response that is good or bad by itself."""

    prompt: PromptParts
    response: str
    good: bool
    source: str = ""
    """As in `RawComparison`."""

    @property
    def texts(self) -> tuple[str, ...]:
        """As in `RawDemonstration`."""
        return (self.response, "good" if self.good else "bad")


@dataclass(frozen=True)
class Format:
    """How to read a row of one kind of data set, in up to three ways; None for those that it cannot be read in."""

    demonstration: Callable[[SourceRow], RawDemonstration] | None
    comparison: Callable[[SourceRow], RawComparison] | None
    labelled: Callable[[SourceRow], RawLabelled] | None = None


# --- tldr: subreddit, title, post, summary, [id] ---------------------------------------------------------------------


def _tldr(row: SourceRow) -> RawDemonstration:
    title = row.text("title", allow_empty=True)
    prompt = tldr_prompt(row.text("subreddit", allow_empty=True), title, row.text("post"))
    metadata = row.other_than("id", "subreddit", "title", "post", "summary")
    return RawDemonstration(prompt, row.text("summary").strip(), title.strip() or None, metadata)


# --- CarperAI/openai_summarize_{tldr,comparisons}: posts already rendered, with single newlines ----------------------

_RENDERED_POST = re.compile(
    r"\s*SUBREDDIT:[ \t]*(?:r/)?(?P<subreddit>[^\n]*?)\s+TITLE:(?P<title>.*?)\sPOST:(?P<post>.*?)(?:TL;DR:\s*)?",
    re.DOTALL,
)


def _rendered_post(row: SourceRow) -> tuple[TextPrompt, str | None]:
    match = _RENDERED_POST.fullmatch(row.text("prompt"))
    if match is None or not match["post"].strip():
        raise SkipRow("not_a_tldr_post")
    title = match["title"].strip()
    return tldr_prompt(match["subreddit"], title, match["post"]), title or None


def _summary(row: SourceRow, column: str) -> str:
    """The summary of a column. Some rows repeat `TL;DR:`, which already ends the prompt, so it is taken off."""
    summary = row.text(column, allow_empty=True).strip().removeprefix("TL;DR:").strip()
    if not summary:
        raise SkipRow("empty_response")
    return summary


def _openai_tldr(row: SourceRow) -> RawDemonstration:
    prompt, title = _rendered_post(row)
    return RawDemonstration(prompt, _summary(row, "label"), title)


def _openai_comparison(row: SourceRow) -> RawComparison:
    return RawComparison(_rendered_post(row)[0], (_summary(row, "chosen"), _summary(row, "rejected")))


# --- Anthropic/hh-rlhf: chosen and rejected are whole dialogues that differ in the last reply ------------------------

_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def parse_dialogue(text: str) -> tuple[Message, ...]:
    """Parse `\\n\\nHuman: ..\\n\\nAssistant: ..` into messages. Successive turns of one speaker become one turn."""
    before, *parts = _TURN.split("\n\n" + text.lstrip())
    if before.strip() or not parts:
        raise SkipRow("not_a_dialogue")
    messages: list[Message] = []
    for speaker, content in zip(parts[::2], parts[1::2], strict=True):
        role, content = _ROLES[speaker], content.strip()
        if messages and messages[-1].role == role:
            messages[-1] = Message(role, f"{messages[-1].content}\n\n{content}".strip())
        else:
            messages.append(Message(role, content))
    return tuple(messages)


def _hh_comparison(row: SourceRow) -> RawComparison:
    context, _, chosen = row.text("chosen").rpartition("\n\nAssistant:")
    other, _, rejected = row.text("rejected").rpartition("\n\nAssistant:")
    if context != other:
        raise SkipRow("different_prompts")
    if not chosen.strip() or not rejected.strip():
        raise SkipRow("empty_response")
    messages = parse_dialogue(context)
    if messages[-1].role != "user" or not messages[-1].content:
        raise SkipRow("no_question")
    return RawComparison(ChatPrompt(messages), (chosen.strip(), rejected.strip()))


# --- stanfordnlp/SHP: a Reddit post and two comments, labels 1 where A got more votes --------------------------------


def _shp_comparison(row: SourceRow) -> RawComparison:
    a, b = row.text("human_ref_A", allow_empty=True).strip(), row.text("human_ref_B", allow_empty=True).strip()
    history = row.text("history", allow_empty=True).strip()
    if not history or not a or not b:
        raise SkipRow("empty_response" if history else "no_question")
    label = row.get("labels")
    if label not in (0, 1):
        raise UserError(f"{row.where}: 'labels' must be 1 (A preferred) or 0 (B preferred), found {label!r}")
    domain = row.values.get("domain")  # the subreddit
    return RawComparison(
        ChatPrompt((Message("user", history),)), (a, b) if label == 1 else (b, a), str(domain) if domain else ""
    )


def _chosen(comparison: Callable[[SourceRow], RawComparison]) -> Callable[[SourceRow], RawDemonstration]:
    """Read a comparison as a demonstration: its better answer is the response."""

    def demonstration(row: SourceRow) -> RawDemonstration:
        raw = comparison(row)
        return RawDemonstration(raw.prompt, raw.responses[0])

    return demonstration


# --- prompts: own files ----------------------------------------------------------------------------------------------


def _messages(row: SourceRow, column: str) -> list[Message]:
    value = row.get(column)
    if not isinstance(value, list) or not value:
        raise UserError(f'{row.where}: {column!r} must be a list of {{"role", "content"}} objects')
    messages = []
    for number, item in enumerate(value, start=1):
        role, content = (item.get("role"), item.get("content")) if isinstance(item, dict) else (None, None)
        if role not in ("system", "user", "assistant") or not isinstance(content, str) or not content.strip():
            raise UserError(f"{row.where}: message {number} needs a role (system, user or assistant) and a content")
        messages.append(Message(role, content.strip()))
    return messages


def _own_prompt(row: SourceRow) -> tuple[PromptParts, str | None, str]:
    """The prompt, the reply if `messages` ends with one, and the column that they are from."""
    if row.values.get("messages") is None:
        if row.values.get("prompt") is None:
            raise UserError(
                f"{row.where}: no 'prompt' (text) or 'messages'; there are: {', '.join(row.values) or 'none'}"
            )
        return plain_prompt(row.text("prompt")), None, "prompt"
    messages = _messages(row, "messages")
    reply = messages.pop().content if messages[-1].role == "assistant" else None
    if not messages or messages[-1].role != "user":
        raise UserError(f"{row.where}: 'messages' must hold a user's turn before the answer")
    return ChatPrompt(tuple(messages)), reply, "messages"


def _own_demonstration(row: SourceRow) -> RawDemonstration:
    prompt, reply, *used = _own_prompt(row)
    if reply is None:
        column = next((name for name in ("response", "reference") if row.values.get(name) is not None), "response")
        reply = row.text(column).strip()
        used.append(column)
    # Every row of a Parquet file has all columns; of those named here, a null says that the row has another one.
    used += [name for name in ("prompt", "messages", "response", "reference") if row.values.get(name) is None]
    return RawDemonstration(prompt, reply, metadata=row.other_than("id", *used))


def _own_comparison(row: SourceRow) -> RawComparison:
    prompt, reply, _ = _own_prompt(row)
    if reply is not None:
        raise UserError(
            f"{row.where}: 'messages' of a comparison must end with the user's turn; the answers are 'responses'"
        )
    source = str(row.values.get("source") or "")
    if row.values.get("responses") is None:
        return RawComparison(prompt, (row.text("chosen").strip(), row.text("rejected").strip()), source)
    responses = row.get("responses")
    if not isinstance(responses, list) or len(responses) < 2 or not all(isinstance(r, str) for r in responses):
        raise UserError(f"{row.where}: 'responses' must be a list of at least two texts, best first")
    return RawComparison(prompt, tuple(response.strip() for response in responses), source)


# --- unpaired: own files, and TRL's unpaired preferences -------------------------------------------------------------


def _unpaired(row: SourceRow) -> RawLabelled:
    if isinstance(row.values.get("prompt"), list):  # as TRL has dialogues
        row = SourceRow(row.where, {**row.values, "messages": row.values["prompt"]})
    prompt, reply, _ = _own_prompt(row)
    column = next((name for name in ("completion", "response") if row.values.get(name) is not None), "completion")
    if reply is None:
        reply = _completion(row, column)
    elif row.values.get(column) is not None:
        raise UserError(f"{row.where}: the dialogue ends with a reply and there is a {column!r}, too; remove one")
    label = row.get("label")
    if label not in (True, False):  # 1 and 0, too
        raise UserError(f"{row.where}: 'label' must be true (a good answer) or false (a bad one), found {label!r}")
    return RawLabelled(prompt, reply, bool(label), str(row.values.get("source") or ""))


def _completion(row: SourceRow, column: str) -> str:
    """An answer: a text, or a list with one reply, as TRL has dialogues."""
    if not isinstance(row.values.get(column), list):
        return row.text(column).strip()
    messages = _messages(row, column)
    if [message.role for message in messages] != ["assistant"]:
        raise UserError(f"{row.where}: {column!r} must be a text or one message of the assistant")
    return messages[0].content


def _good(row: SourceRow) -> RawDemonstration:
    raw = _unpaired(row)
    if not raw.good:
        raise SkipRow("bad_answer")
    return RawDemonstration(raw.prompt, raw.response)


FORMATS: dict[str, Format] = {
    "tldr": Format(_tldr, None),
    "openai_summarize_tldr": Format(_openai_tldr, None),
    "openai_summarize_comparisons": Format(None, _openai_comparison),
    "hh_rlhf": Format(_chosen(_hh_comparison), _hh_comparison),
    "shp": Format(_chosen(_shp_comparison), _shp_comparison),
    "prompts": Format(_own_demonstration, _own_comparison),
    "unpaired": Format(_good, None, _unpaired),
}
