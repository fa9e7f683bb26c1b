"""The section `rewards`: the rewards that the stage `rl` maximises the weighted sum of."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from rayrlhf.sections import Section

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


def _distinct(rewards: tuple[Reward, ...]) -> tuple[Reward, ...]:
    names = [reward.name for reward in rewards]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"two rewards are named {twice!r}; give one of them another name")
    if sum(isinstance(reward, ModelReward) for reward in rewards) > 1:
        raise ValueError("one reward of kind model at most: a run trains one reward model")
    return rewards


Reward = Annotated[ModelReward | PythonReward, Field(discriminator="kind")]
Rewards = Annotated[tuple[Reward, ...], Field(min_length=1), AfterValidator(_distinct)]
