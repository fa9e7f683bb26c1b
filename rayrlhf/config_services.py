"""What the sections of services and judges have in common: where one is, and how patiently it is asked."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, Field

from rayrlhf.sections import Fraction, Positive, Section

HOW_ASKED = ("timeout_s", "retries", "concurrency", "token_variable", "cache")
"""Keys that do not change what a service says: a run whose values change goes on from its checkpoint."""


def _absolute(path: str) -> str:
    if not path.startswith(("/", "~")):
        raise ValueError("give an absolute directory, since scorers do not work in the command's own one")
    return path


class ServiceSection(Section):
    """A service behind an address."""

    url: Annotated[str, Field(pattern=r"^https?://[^@\s]+$")]
    """Without a key in it; see `token_variable`."""
    timeout_s: Positive = 60
    """How long one answer may take."""
    retries: Annotated[int, Field(ge=0)] = 4
    """Further tries after a time-out, a broken connection or a status such as 429 or 503, with growing pauses."""
    concurrency: Positive = 8
    """Requests at a time of each process that asks: of a scorer, or of the driver where it is the labeller."""
    token_variable: str | None = None
    """The environment variable of these processes whose value is sent as a bearer token."""


class JudgeSection(ServiceSection):
    """A language model that judges, behind an OpenAI-compatible endpoint, see `rayrlhf.rewards.judge_client`."""

    url: Annotated[str, Field(pattern=r"^https?://[^@\s]+$")]
    """Up to the version, such as http://127.0.0.1:8000/v1."""
    model: str
    """Its name at the endpoint."""
    rubric: str
    """What makes an answer good, in words."""
    max_tokens: Positive = 16
    """Of the judge's reply."""
    body: dict[str, Any] = Field(default={})
    """Further keys of every request, such as `structured_outputs: {choice: [A, B, C]}` of vLLM."""
    cache: Annotated[str, AfterValidator(_absolute)] | None = None
    """A directory on each node's own disk that keeps the replies, so that no later run pays for them again."""
    max_unusable: Fraction = 0.01
    """The run ends when more than this share of a process's questions got no usable reply, of 1000 at least."""
