"""What a row means, before the tokenizer: a prompt in parts, and what there is to it.

The prompt stays in parts, because cutting needs the tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rayrlhf.data.files import SourceRow
from rayrlhf.data.template import PromptParts


class SkipRow(Exception):
    """Raised for a row of a published data set that cannot be used; the message is the reason that is counted."""


@dataclass(frozen=True)
class RawPrompt:
    """A prompt in parts, with a person's own answer if there is one."""

    prompt: PromptParts
    reference: str | None = None
    title: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """The columns that the format does not use; published data sets have none."""

    @property
    def texts(self) -> tuple[str, ...]:
        """What tells rows of the same prompt apart."""
        return () if self.reference is None else (self.reference,)


@dataclass(frozen=True)
class RawDemonstration:
    """A prompt in parts, and the response to imitate."""

    prompt: PromptParts
    response: str
    title: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """As in `RawPrompt`."""

    @property
    def texts(self) -> tuple[str, ...]:
        """As in `RawPrompt`."""
        return (self.response,)


@dataclass(frozen=True)
class RawComparison:
    """A prompt in parts, and at least two responses, best first."""

    prompt: PromptParts
    responses: tuple[str, ...]
    source: str = ""
    """Where within the data set it comes from; the reward model's accuracy is also reported by source."""
    scores: tuple[float, ...] | None = None
    """[K] falling; responses with equal ones are no preference. None if the responses only have an order."""

    @property
    def texts(self) -> tuple[str, ...]:
        """As in `RawPrompt`."""
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
        """As in `RawPrompt`."""
        return (self.response, "good" if self.good else "bad")


Demonstrate = Callable[[SourceRow], RawDemonstration]
Compare = Callable[[SourceRow], RawComparison]


def chosen(comparison: Compare) -> Demonstrate:
    """Read a comparison as a demonstration: its best answer is the response."""

    def demonstration(row: SourceRow) -> RawDemonstration:
        raw = comparison(row)
        return RawDemonstration(raw.prompt, raw.responses[0])

    return demonstration
