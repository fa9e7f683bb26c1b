"""Prompts as text: the TL;DR template, chat templates, and how a long prompt is cut.

A prompt is first kept in parts (`TextPrompt`, `ChatPrompt`), because only some parts may be cut.
`fit_prompts` renders it within the token limit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from jinja2 import TemplateError

from rayrlhf.data.records import Message
from rayrlhf.data.tokens import encode_prompts, leading_ids, message_cleaner, special_text_remover, starts_with_bos
from rayrlhf.data.turns import SPEAKERS
from rayrlhf.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHUNK = 1024  # prompts tokenised at a time: bounds the memory of their offsets


@dataclass(frozen=True)
class TextPrompt:
    """A text in three parts; only the body may be cut, at its end."""

    head: str
    body: str
    tail: str

    messages: ClassVar[tuple[Message, ...]] = ()
    """A text is no dialogue."""

    @property
    def text(self) -> str:
        return self.head + self.body + self.tail

    @property
    def blank(self) -> bool:
        """Whether it asks nothing. A head and a tail around a body only frame it."""
        return not (self.body if self.head else self.text).strip()

    def map(self, change: Callable[[str], str]) -> TextPrompt:
        return TextPrompt(change(self.head), change(self.body), change(self.tail))


@dataclass(frozen=True)
class ChatPrompt:
    """A dialogue that ends with the user's turn; the assistant is to answer."""

    messages: tuple[Message, ...]

    @property
    def text(self) -> str:
        """HH-RLHF's own rendering, which also serves a tokenizer without a chat template."""
        turns = (f"\n\n{SPEAKERS[role]}: {content}" for role, content in self.messages)
        return "".join(turns) + "\n\nAssistant:"

    @property
    def blank(self) -> bool:
        """Whether it asks nothing."""
        return not self.messages[-1].content.strip()

    def map(self, change: Callable[[str], str]) -> ChatPrompt:
        return ChatPrompt(tuple(Message(role, change(content)) for role, content in self.messages))


PromptParts = TextPrompt | ChatPrompt


class Fitted(NamedTuple):
    """A rendered prompt that fits the limit."""

    text: str
    tokens: int
    """Of the whole prompt, BOS included, before it was cut."""
    ids: tuple[int, ...]
    """Of the text, as `encode_prompts` has them."""


def tldr_prompt(subreddit: str, title: str, post: str) -> TextPrompt:
    """The published TL;DR template (Stiennon et al. 2020). Only the post may be cut."""
    head = f"SUBREDDIT: r/{subreddit.strip().removeprefix('r/')}\n\nTITLE: {title.strip()}\n\nPOST: "
    return TextPrompt(head, post.strip(), "\n\nTL;DR:")


def plain_prompt(text: str) -> TextPrompt:
    """A text that its owner has rendered. The last line, which asks or cues, stays; the lines before it may be cut."""
    before, _, _ = text.rstrip().rpartition("\n")
    body = before.rstrip()
    return TextPrompt("", body, text[len(body) :]) if body else TextPrompt("", text, "")


def cleaner(tokenizer: PreTrainedTokenizerBase) -> Callable[[PromptParts], PromptParts]:
    """Make a function that removes from a prompt what only the tokenizer and its template may write.

    These are special tokens and, from the turns of a dialogue, texts with which a turn would pose as several. A text
    that its owner has rendered keeps the latter.
    """
    of_text, of_turn = special_text_remover(tokenizer), message_cleaner(tokenizer)
    return lambda prompt: prompt.map(of_text if isinstance(prompt, TextPrompt) else of_turn)


def render(tokenizer: PreTrainedTokenizerBase, prompt: PromptParts) -> str:
    """The whole prompt as text. Messages go through the tokenizer's chat template, if it has one."""
    if isinstance(prompt, TextPrompt) or not tokenizer.chat_template:
        return prompt.text
    messages = [{"role": role, "content": content} for role, content in prompt.messages]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def told_first(tokenizer: PreTrainedTokenizerBase, system: str, prompt: PromptParts) -> PromptParts:
    """Put `data.system_prompt` before a prompt.

    A dialogue gets a system turn, unless it has one. A text becomes the user's turn under one, if the tokenizer has a
    chat template, and stays a text that can be cut as before; else the system prompt is its first paragraph.

    Raises:
        TemplateError: the chat template refuses a system turn.
    """
    first = Message("system", system)
    if not isinstance(prompt, TextPrompt):
        has_one = any(message.role == "system" for message in prompt.messages)
        return prompt if has_one else ChatPrompt((first, *prompt.messages))
    if not tokenizer.chat_template:
        return TextPrompt(f"{system}\n\n{prompt.head}", prompt.body, prompt.tail)
    place = "xyzzy"  # many templates strip a content, and would change the text itself
    before, _, behind = render(tokenizer, ChatPrompt((first, Message("user", place)))).rpartition(place)
    return TextPrompt(before + prompt.head, prompt.body, prompt.tail + behind)


def fit_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[PromptParts], max_tokens: int, where: Sequence[str]
) -> list[Fitted]:
    """Render prompts with at most `max_tokens` tokens each, BOS included.

    A text is cut at the last newline of its body that fits, else at the last space. If the body is one endless word,
    it is cut at a token. A dialogue loses its oldest turns; if the last turn alone is too long, it is cut like a text.

    Args:
        where: the origin of each prompt (file and row), for error messages.

    Raises:
        UserError: the fixed parts of a prompt exceed the limit by themselves, the chat template refuses a prompt, or
            the tokenizer has no fast version.
    """
    check_fast(tokenizer)
    fitted: list[Fitted] = []
    for start in range(0, len(prompts), _CHUNK):
        chunk = slice(start, start + _CHUNK)
        fitted += _fit_chunk(tokenizer, prompts[chunk], max_tokens, where[chunk])
    return fitted


def check_fast(tokenizer: PreTrainedTokenizerBase) -> None:
    """
    Raises:
        UserError: the tokenizer has no fast version.
    """
    if not tokenizer.is_fast:
        raise UserError(
            f"tokenizer {tokenizer.name_or_path!r} has no fast version (tokenizer.json); cutting prompts needs one"
        )


def _fit_chunk(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[PromptParts], max_tokens: int, where: Sequence[str]
) -> list[Fitted]:
    texts: list[str] = []
    for prompt, origin in zip(prompts, where, strict=True):
        try:
            texts.append(render(tokenizer, prompt))
        except TemplateError as error:
            raise UserError(f"{origin}: the tokenizer's chat template refuses these messages: {error}") from None
    encodings = tokenizer(texts, add_special_tokens=False, verbose=False).encodings
    assert encodings is not None  # a fast tokenizer has them
    lead = leading_ids(tokenizer)
    waiting: dict[int, Iterator[str]] = {}
    found: list[list[int]] = []
    lengths = []
    for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        # A text that spells its BOS has it among its own tokens already.
        added = [] if starts_with_bos(tokenizer, text) else lead
        room = max_tokens - len(added)
        found.append(added + encodings[i].ids)
        lengths.append(len(found[i]))
        if lengths[i] <= max_tokens:
            continue
        if isinstance(prompt, TextPrompt):
            waiting[i] = _cuts(prompt, encodings[i].offsets, room)
        else:
            waiting[i] = _shorter_dialogues(tokenizer, prompt, room)
    # Each round tries the next candidate of every prompt that does not fit yet, all in one call of the tokenizer.
    while waiting:
        for i in waiting:
            candidate = next(waiting[i], None)
            if candidate is None:
                raise UserError(
                    f"{where[i]}: the prompt does not fit data.max_prompt_tokens={max_tokens} even without its text; "
                    "raise the limit or remove the row"
                )
            texts[i] = candidate
        indices = list(waiting)
        for i, ids in zip(indices, encode_prompts(tokenizer, [texts[i] for i in indices]), strict=True):
            if len(ids) <= max_tokens:
                found[i] = ids
                del waiting[i]
    return list(map(Fitted, texts, lengths, map(tuple, found)))


def _cuts(prompt: TextPrompt, offsets: Sequence[tuple[int, int]], room: int) -> Iterator[str]:
    """Yield shorter texts, the preferred ones first. The first ones may still be too long: the caller measures them.

    The offsets of the whole text say roughly where the limit lies. A cut can merge or split the tokens at the seam,
    so the search starts two tokens beyond that place.
    """
    slack = 2
    body_end = len(prompt.head) + len(prompt.body)
    tail = sum(start >= body_end for start, _ in offsets) if prompt.tail else 0
    head = sum(end <= len(prompt.head) and end > 0 for _, end in offsets) if prompt.head else 0
    if head + tail > room + slack:
        return
    last_token = min(room - tail + slack, len(offsets)) - 1
    reach = min(max(offsets[last_token][1] - len(prompt.head), 0), len(prompt.body)) if last_token >= 0 else 0
    for mark in ("\n", " "):
        # + 1: a mark right behind the last token that fits costs nothing, since it is stripped.
        cut = prompt.body.rfind(mark, 0, reach + 1)
        while cut > 0:
            kept = prompt.body[:cut].rstrip()
            if kept:
                yield prompt.head + kept + prompt.tail
            cut = prompt.body.rfind(mark, 0, len(kept))
    for _, end in reversed(offsets[: last_token + 1]):
        if len(prompt.head) < end <= body_end:
            yield prompt.head + prompt.body[: end - len(prompt.head)] + prompt.tail


def _shorter_dialogues(tokenizer: PreTrainedTokenizerBase, prompt: ChatPrompt, room: int) -> Iterator[str]:
    """Yield the dialogue without its oldest turns, then the last turn cut like a text. System messages stay."""
    system = tuple(m for m in prompt.messages if m.role == "system")
    turns = tuple(m for m in prompt.messages if m.role != "system")
    for first in range(1, len(turns)):
        if turns[first].role == "user":  # many chat templates refuse a dialogue that starts with an assistant
            yield render(tokenizer, ChatPrompt(system + turns[first:]))
    last = turns[-1].content
    head, found, tail = render(tokenizer, ChatPrompt((*system, turns[-1]))).rpartition(last)
    if found:  # not if the template changes the content: then nobody knows where the last turn lies
        parts = TextPrompt(head, last, tail)
        encodings = tokenizer(parts.text, add_special_tokens=False, verbose=False).encodings
        assert encodings is not None
        yield from _cuts(parts, encodings[0].offsets, room)
