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
    tokens: int = field(default=0, compare=False)
    """Of the whole prompt, before it is cut; BOS included."""
    group: str | None = field(default=None, compare=False)
    """What all records of this prompt share; None if it is the only one."""
    ids: tuple[int, ...] = field(default=(), compare=False)
    """The token ids of `text`."""
    response_ids: tuple[tuple[int, ...], ...] = field(default=(), compare=False)
    """The token ids of `answers`, whole: no limit has cut them."""

    @property
    def answers(self) -> tuple[str, ...]:
        """The texts that may follow the prompt."""
        return () if self.reference is None else (self.reference,)

    @property
    def split_key(self) -> str:
        """What its split follows from."""
        return self.group or self.id


@dataclass(frozen=True)
class Demonstration(Prompt):
    """A prompt whose reference is the response to imitate."""

    reference: str

    @property
    def prompt(self) -> str:
        return self.text

    @property
    def response(self) -> str:
        return self.reference


@dataclass(frozen=True)
class Comparison:
    """At least two answers to one prompt, best first; no two are equal."""

    id: str
    prompt: str
    responses: tuple[str, ...]
    source: str = ""
    scores: tuple[float, ...] | None = None
    """[K] falling; equal ones are no preference. None if the answers only have an order."""
    tokens: int = field(default=0, compare=False)
    """As in `Prompt`, and so are the next ones."""
    ids: tuple[int, ...] = field(default=(), compare=False)
    response_ids: tuple[tuple[int, ...], ...] = field(default=(), compare=False)

    @property
    def text(self) -> str:
        return self.prompt

    @property
    def answers(self) -> tuple[str, ...]:
        return self.responses


@dataclass(frozen=True)
class LabelledAnswer:
    """One answer to a prompt, good or bad by itself."""

    id: str
    prompt: str
    response: str
    good: bool
    source: str = ""
    tokens: int = field(default=0, compare=False)
    """As in `Prompt`, and so are the next ones."""
    ids: tuple[int, ...] = field(default=(), compare=False)
    response_ids: tuple[tuple[int, ...], ...] = field(default=(), compare=False)

    @property
    def text(self) -> str:
        return self.prompt

    @property
    def answers(self) -> tuple[str, ...]:
        return (self.response,)
