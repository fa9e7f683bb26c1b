"""The section `rewards`: the rewards that the stage `rl` maximises the weighted sum of."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from rayrlhf.config_services import JudgeSection, ServiceSection
from rayrlhf.sections import Positive, Section

Name = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]*$")]


class RewardSection(Section):
    """What every reward has."""

    name: Name
    weight: float = 1.0
    normalize: bool = False
    """In every batch of `rl` its scores lose their mean and are divided by their standard deviation, before `weight`
    (`rayrlhf.rewards.functions.learned_scores`)."""

    @property
    def trained(self) -> bool:
        """Whether it is the reward model that the stage `reward_model` trains."""
        return False


class ModelReward(RewardSection):
    """A reward model: without `path` the one that the stage `reward_model` trains on the comparisons, with it one from
    elsewhere, which reads texts by its own tokenizer (`rayrlhf.rewards.pretrained`)."""

    kind: Literal["model"] = "model"
    name: Name = "reward_model"
    path: str | None = None
    """A directory or a hub name of a model that transformers' AutoModelForSequenceClassification loads."""
    revision: str | None = None
    """Of a hub name: a branch, tag or commit."""
    label: str | int | None = None
    """Which output is the score, by its name in the model's `id2label` or by its index; null: the only one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights of a model from elsewhere, in which it also computes."""
    suffix: str = ""
    """A text behind every response, such as the EOS at which a model without a chat template was trained to be read."""

    @property
    def trained(self) -> bool:
        return self.path is None

    @model_validator(mode="after")
    def _has_a_path(self) -> ModelReward:
        own = ("revision", "label", "dtype", "suffix")
        given = [key for key in own if getattr(self, key) != type(self).model_fields[key].default]
        if self.trained and given:
            raise ValueError(f"{', '.join(given)}: only a model from elsewhere takes this; give its path")
        return self


class PythonReward(RewardSection):
    """A function in a file of your own; docs/extending.md shows one."""

    kind: Literal["python"] = "python"
    path: Annotated[str, Field(pattern=r"^(.*\.py|[\w.]+):\w+$")]
    """FILE.py:FUNCTION, or MODULE:FUNCTION such as `rayrlhf.rewards.verifiable:exact`."""
    settings: dict[str, Any] = Field(default={})
    """Further keyword arguments of the function."""


class HttpReward(ServiceSection, RewardSection):
    """A service of your own that answers a POST of responses with scores, see `rayrlhf.rewards.http`."""

    kind: Literal["http"] = "http"
    batch_size: Positive = 32
    """Responses in one request."""
    settings: dict[str, Any] = Field(default={})
    """Sent with every request."""
    metadata: bool = False
    """Send the further columns of each prompt's row in the data, too."""


class JudgeReward(JudgeSection, RewardSection):
    """A language model that judges, see `rayrlhf.rewards.judge`."""

    kind: Literal["judge"] = "judge"
    compare: Literal["nothing", "reference"] = "nothing"
    """Rate an answer by itself, or compare it with the reference, in both orders."""


class EnvironmentReward(RewardSection):
    """The sum of the rewards that the run's `environment` gave."""

    kind: Literal["environment"] = "environment"
    name: Name = "environment"


def _distinct(rewards: tuple[Reward, ...]) -> tuple[Reward, ...]:
    if not rewards:
        raise ValueError("name one reward at least")
    names = [reward.name for reward in rewards]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"two rewards are named {twice!r}; give one of them another name")
    if sum(reward.trained for reward in rewards) > 1:
        raise ValueError("one reward of kind model at most without a path: a run trains one")
    if sum(isinstance(reward, EnvironmentReward) for reward in rewards) > 1:
        raise ValueError("one reward of kind environment at most")
    return rewards


Reward = Annotated[
    ModelReward | PythonReward | HttpReward | JudgeReward | EnvironmentReward, Field(discriminator="kind")
]
Rewards = Annotated[tuple[Reward, ...], AfterValidator(_distinct)]
