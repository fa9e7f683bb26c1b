"""Typed records, validated at the door. A prompt is text that is already rendered by its template."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Prompt:
    """Something to answer; `reference` is a person's own answer where there is one."""

    id: str
    text: str
    reference: str | None = None
    title: str | None = None
    """The post's title where the data has one: repeating it is a baseline for summaries."""


@dataclass(frozen=True)
class Demonstration:
    """A prompt with the response to imitate."""

    id: str
    prompt: str
    response: str
    title: str | None = None


@dataclass(frozen=True)
class Comparison:
    """Answers to one prompt, best first (at least two, no two equal)."""

    id: str
    prompt: str
    responses: tuple[str, ...]
    source: str = ""
