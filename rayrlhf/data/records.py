"""The records of a data set, validated when it is read. A prompt is text that its template has already rendered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Message(NamedTuple):
    """One turn of a dialogue; role is `system`, `user` or `assistant`."""

    role: str
    content: str


@dataclass(frozen=True)
class Prompt:
    """A text to answer."""

    id: str
    text: str
    reference: str | None = None
    """A person's own answer, if the data has one."""
    title: str | None = None
    """The post's title, if the data has one. Repeating it is the evaluation's baseline for summaries."""
    messages: tuple[Message, ...] = ()
    """The dialogue that `text` renders, whole also where `text` is cut; empty where the data has a text."""
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """The columns of the prompt's row that its format does not use, for rewards of the user's own."""


@dataclass(frozen=True)
class Demonstration:
    """A prompt with the response to imitate."""

    id: str
    prompt: str
    response: str
    title: str | None = None
    messages: tuple[Message, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Comparison:
    """At least two answers to one prompt, best first; no two are equal."""

    id: str
    prompt: str
    responses: tuple[str, ...]
    source: str = ""


@dataclass(frozen=True)
class LabelledAnswer:
    """One answer to a prompt, good or bad by itself."""

    id: str
    prompt: str
    response: str
    good: bool
    source: str = ""
