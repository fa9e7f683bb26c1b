"""What a chat template writes around the turns of a dialogue: the cue for the assistant, the end of a turn, markers.

The template is asked, not read: it renders a dialogue of words that no template has of its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from jinja2 import TemplateError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SAID = ("xyzzy", "plugh", "frotz", "quux")
SPEAKERS = {"user": "Human", "assistant": "Assistant", "system": "System"}
"""Of a plain dialogue, which serves a tokenizer without a chat template."""


def cue(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """What the chat template writes behind a user's turn for the assistant to answer; None without a template."""
    rendered = _rendered(tokenizer, ("user",), asks=True)
    return None if rendered is None else rendered.rpartition(_SAID[0])[2]


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The token that the chat template writes behind an assistant's message; None where it writes none there."""
    rendered = _rendered(tokenizer, ("user", "assistant"))
    _, found, behind = (rendered or "").rpartition(_SAID[1])
    candidates = [token for token in _tokens(tokenizer) if found and behind.lstrip().startswith(token)]
    return max(candidates, key=len, default=None)


def spelled_tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """The tokens that no text from outside may spell: special ones, and added ones that the chat template writes.

    `<|im_start|>` opens a turn whether or not its owner called it special. Other added tokens are content.
    """
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return (special | written_tokens(tokenizer) | set(tokenizer.all_special_tokens)) - {""}


def written_tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """The special and added tokens that the chat template writes."""
    written = "".join(dialogues(tokenizer))
    return {token for token in _tokens(tokenizer) if token in written}


def turn_texts(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Texts that open a turn by themselves, without a token that no text may spell, such as `[/INST]`.

    Without a chat template these are the names of the speakers behind an empty line.
    """
    if not tokenizer.chat_template:
        return {f"\n\n{name}:" for name in SPEAKERS.values()}
    tokens = spelled_tokens(tokenizer)
    seams = [seam for text in dialogues(tokenizer) for seam in re.split("|".join(_SAID), text)[1:-1]]
    # A line break before it stays part of it: `assistant:` in the middle of a line opens nothing.
    between = {seam.strip(" ").rstrip() for seam in seams}
    return {text for text in between if text and not any(token in text for token in tokens)}


def remover(texts: Iterable[str]) -> Callable[[str], str]:
    """Make a function that removes all of these texts from a text, none of which may be empty."""
    # Longest first: a shorter one may be the beginning of a longer one.
    ordered = sorted(texts, key=len, reverse=True)
    if not ordered:
        return lambda text: text
    pattern = re.compile("|".join(map(re.escape, ordered)))

    def remove(text: str) -> str:
        # Again until none is found: removing one may join the halves of another, as in `</</s>s>`.
        while pattern.search(text):
            text = pattern.sub("", text)
        return text

    return remove


def _tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Special and added tokens by their spelling."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    return (added | set(tokenizer.all_special_tokens)) - {""}


def dialogues(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Rendered dialogues with every kind of seam that the template knows. Not every template takes a system turn."""
    roles = ("user", "assistant", "user")
    found = [_rendered(tokenizer, each, asks=True) for each in (("system", *roles), roles)]
    return [text for text in found if text is not None]


def _rendered(tokenizer: PreTrainedTokenizerBase, roles: Sequence[str], asks: bool = False) -> str | None:
    """A dialogue whose n-th turn says the n-th word of `_SAID`; None without a template, or one that refuses it."""
    if not tokenizer.chat_template:
        return None
    messages = [{"role": role, "content": said} for role, said in zip(roles, _SAID, strict=False)]
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks))
    except TemplateError:  # it wants other roles
        return None
