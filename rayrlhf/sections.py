"""The parts of the config that several of its files use."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """Base of all sections. An unknown key is an error, and a value of another type is not converted."""

    # No protected namespaces: pydantic would warn of field names that begin as its own methods do.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())


class OptimizerConfig(Section):
    """AdamW, its learning-rate schedule and gradient clipping."""

    lr: Annotated[float, Field(gt=0)] = 3e-6
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of Adam's first and second moment."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    warmup_fraction: Fraction = 0.0
    """Share of the stage's steps in which the learning rate rises linearly to `lr`."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Limit of the norm of one model's whole gradient, summed over workers."""
