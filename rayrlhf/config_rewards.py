"""The section `rewards`: the rewards that the stage `rl` maximises the weighted sum of."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from rayrlhf.sections import Positive, Section

Name = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]*$")]


class ModelReward(Section):
    """The reward model that the stage `reward_model` trains on the comparisons."""

    kind: Literal["model"] = "model"
    name: Name = "reward_model"
    weight: float = 1.0


class PythonReward(Section):
    """A function in a file of your own; docs/extending.md shows one."""

    kind: Literal["python"] = "python"
    name: Name
    weight: float = 1.0
    path: Annotated[str, Field(pattern=r"^(.*\.py|[\w.]+):\w+$")]
    """FILE.py:FUNCTION, or MODULE:FUNCTION such as `rayrlhf.rewards.verifiable:exact`."""
    settings: dict[str, Any] = Field(default={})
    """Further keyword arguments of the function."""


class ServiceReward(Section):
    """What a reward behind an address has; docs/extending.md shows one."""

    name: Name
    weight: float = 1.0
    url: Annotated[str, Field(pattern=r"^https?://[^@\s]+$")]
    """Without a key in it; see `token_variable`."""
    timeout_s: Positive = 60
    """How long one answer may take."""
    retries: Annotated[int, Field(ge=0)] = 4
    """Further tries after a time-out, a broken connection or a status such as 429 or 503, with growing pauses."""
    concurrency: Positive = 8
    """Requests of one scorer at a time."""
    token_variable: str | None = None
    """The environment variable of the scorers whose value is sent as a bearer token."""


class HttpReward(ServiceReward):
    """A service of your own that answers a POST of responses with scores, see `rayrlhf.rewards.http`."""

    kind: Literal["http"] = "http"
    batch_size: Positive = 32
    """Responses in one request."""
    settings: dict[str, Any] = Field(default={})
    """Sent with every request."""


class JudgeReward(ServiceReward):
    """A language model that judges, behind an OpenAI-compatible endpoint, see `rayrlhf.rewards.judge`."""

    kind: Literal["judge"] = "judge"
    url: Annotated[str, Field(pattern=r"^https?://[^@\s]+$")]
    """Up to the version, such as http://127.0.0.1:8000/v1."""
    model: str
    """Its name at the endpoint."""
    rubric: str
    """What makes an answer good, in words."""
    compare: Literal["nothing", "reference"] = "nothing"
    """Rate an answer by itself, or compare it with the reference, in both orders."""
    max_tokens: Positive = 16
    """Of the judge's reply."""
    body: dict[str, Any] = Field(default={})
    """Further keys of every request, such as `structured_outputs: {choice: [A, B, C]}` of vLLM."""


class EnvironmentReward(Section):
    """The sum of the rewards that the run's `environment` gave."""

    kind: Literal["environment"] = "environment"
    name: Name = "environment"
    weight: float = 1.0


def _distinct(rewards: tuple[Reward, ...]) -> tuple[Reward, ...]:
    names = [reward.name for reward in rewards]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"two rewards are named {twice!r}; give one of them another name")
    for kind, why in ((ModelReward, "model at most: a run trains one"), (EnvironmentReward, "environment at most")):
        if sum(isinstance(reward, kind) for reward in rewards) > 1:
            raise ValueError(f"one reward of kind {why}")
    return rewards


Reward = Annotated[
    ModelReward | PythonReward | HttpReward | JudgeReward | EnvironmentReward, Field(discriminator="kind")
]
Rewards = Annotated[tuple[Reward, ...], Field(min_length=1), AfterValidator(_distinct)]
