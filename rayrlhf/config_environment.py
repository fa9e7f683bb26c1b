"""The section `environment`: what answers a policy that writes in turns."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from rayrlhf.sections import Positive, Section


class EnvironmentConfig(Section):
    """A class in a file of your own; docs/extending.md shows one. `rl` and `evaluate` play with it."""

    path: Annotated[str, Field(pattern=r"^(.*\.py|[\w.]+):\w+$")]
    """FILE.py:CLASS, or MODULE:CLASS such as `rayrlhf.environments.guess:Guess`."""
    max_turns: Annotated[int, Field(ge=2)] = 8
    """How often the policy writes at most. data.max_response_tokens bounds all turns and observations together."""
    step_timeout_s: Positive = 60
    """How long the environment may take to answer a turn."""
    threads: Positive = 8
    """How many trajectories of one generator it answers at the same time."""
    settings: dict[str, Any] = Field(default={})
    """Keyword arguments of the class."""
