"""The parts of the config that several of its files use."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
NotAll = Annotated[float, Field(ge=0.0, lt=1.0)]
"""A share that leaves something."""
Positive = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """Base of all sections. An unknown key is an error, and a value of another type is not converted."""

    # No protected namespaces: pydantic would warn of field names that begin as its own methods do.
    # An alias is the key where Python reserves the word, as `from`: files and dumps know that one only.
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=(), serialize_by_alias=True
    )

    CHOSEN: ClassVar[tuple[str, ...]] = ()
    """Keys that may be `auto`, as they are where they are not given: a run chooses their values when it starts."""

    @model_validator(mode="before")
    @classmethod
    def _leave_out_what_is_auto(cls, tree: Any) -> Any:
        auto = {key for key in cls.CHOSEN if isinstance(tree, dict) and tree.get(key) == "auto"}
        return {key: value for key, value in tree.items() if key not in auto} if auto else tree

    @property
    def to_choose(self) -> tuple[str, ...]:
        """The keys of `CHOSEN` that have no value yet but their default, which counts for nothing."""
        return tuple(key for key in self.CHOSEN if key not in self.model_fields_set)

    def completed(self, chosen: dict[str, Any]) -> Self:
        """A copy with these values where no value was given."""
        return self.model_copy(update={key: chosen[key] for key in chosen if key not in self.model_fields_set})


class StartSection(Section):
    """What stages have that begin with a model."""

    start: str | None = Field(default=None, alias="from")
    """`from`: the model to begin with, in place of an earlier stage's: a directory, a hub name, or the folder of a run,
    which stands for the model that its stage of the same name made. null: an earlier stage's (docs/starting_points.md).
    """


class ReferenceSection(StartSection):
    """What stages have whose policy is compared with a reference policy."""

    reference_from: str | None = None
    """The reference policy: `sft` for the run's SFT model, or a model as in `from`. null: the model that the stage
    begins with."""


class DrawConfig(Section):
    """How tokens are drawn where nothing is learnt from their log-probs. `rl` has the temperature alone: a truncated
    distribution leaves out other tokens after every update, and then the ratio of new to old policy is undefined."""

    temperature: Annotated[float, Field(ge=0.01)] = 0.7  # vLLM would raise a lower one to 0.01
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Draw from the fewest tokens whose probabilities add up to this (Holtzman et al. 2020); 1: from all."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Draw from so many tokens, the most probable ones; 0: from all."""
    min_p: Fraction = 0.0
    """Draw from the tokens that have at least this share of the most probable one's probability; 0: from all."""


class OptimizerConfig(Section):
    """AdamW, its learning-rate schedule and gradient clipping."""

    lr: Annotated[float, Field(gt=0)] = 3e-6
    betas: tuple[NotAll, NotAll] = (0.9, 0.95)
    """Decay of Adam's first and second moment."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    warmup_fraction: Fraction = 0.0
    """Share of the stage's steps in which the learning rate rises linearly to `lr`."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Limit of the norm of one model's whole gradient, summed over workers."""
