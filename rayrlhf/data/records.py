"""The records of a data set, validated when it is read. A prompt is text that its template has already rendered."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Prompt:
    """A text to answer."""

    id: str
    text: str
    reference: str | None = None
    """A person's own answer, if the data has one."""
    title: str | None = None
    """The post's title, if the data has one. Repeating it is the evaluation's baseline for summaries."""


@dataclass(frozen=True)
class Demonstration:
    """A prompt with the response to imitate."""

    id: str
    prompt: str
    response: str
    title: str | None = None


@dataclass(frozen=True)
class Comparison:
    """At least two answers to one prompt, best first; no two are equal."""

    id: str
    prompt: str
    responses: tuple[str, ...]
    source: str = ""
