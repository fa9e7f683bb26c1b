"""AdamW with gradient clipping and a learning-rate schedule, for one model on all ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from rayrlhf.models.ranks import Ranks
from rayrlhf.sections import OptimizerConfig


class Optimizer:
    """AdamW (Loshchilov and Hutter 2019) with clipping, and a learning-rate schedule over a known number of steps.

    Per step: `clip`, then `apply` or `skip`. Gradients are those that backward passes have added up since.
    """

    def __init__(self, model: nn.Module, config: OptimizerConfig, steps: int, lr: float | None = None) -> None:
        """Take over the parameters that are trained, in the model's order.

        Args:
            model: float32.
            config: of the optimiser.
            steps: of the whole training; the schedule ends with them.
            lr: peak learning rate in place of the config's.
        """
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.max_grad_norm = config.max_grad_norm
        self.adamw = torch.optim.AdamW(
            self.parameters,
            lr=lr or config.lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=True,  # one pass over all parameters in place of several for each
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.adamw, lambda step: lr_factor(config, step, steps))

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        return float(self.schedule.get_last_lr()[0])

    def step(self, ranks: Ranks) -> float:
        """Sum gradients over ranks, clip, update, advance the schedule: `clip` and `apply`.

        Returns:
            The gradient norm before clipping.

        Raises:
            FloatingPointError: a gradient is not finite; the weights are left as they were.
        """
        norm = self.clip(ranks)
        self.apply()
        return norm

    def clip(self, ranks: Ranks) -> float:
        """The first half of `step`, which changes no weight.

        Two models that learn together are both clipped before either is updated: if one gradient is not finite, both
        models stay as they are.

        Returns:
            The norm over all ranks before clipping.

        Raises:
            FloatingPointError: the norm is not finite.
        """
        norm = ranks.clip_gradients(self.parameters, self.max_grad_norm)
        if not np.isfinite(norm):
            raise FloatingPointError(
                f"the gradient norm is {norm} (usually a learning rate that is too high); training stopped before the "
                "update"
            )
        return norm

    def apply(self) -> None:
        """The second half of `step`: update the weights and advance the schedule."""
        self.adamw.step()
        self.schedule.step()
        self.adamw.zero_grad(set_to_none=True)

    def skip(self) -> None:
        """Drop the gradients and advance the schedule."""
        # AdamW leaves a parameter without a gradient alone, weight decay included. It is called all the same, because
        # torch warns of a schedule that advances without its optimiser.
        self.adamw.zero_grad(set_to_none=True)
        self.apply()

    def state_dict(self) -> dict[str, Any]:
        """Moments and schedule, for `load_state_dict`; parameters are numbered in the model's order."""
        return {"adamw": self.adamw.state_dict(), "schedule": self.schedule.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.adamw.load_state_dict(state["adamw"])
        self.schedule.load_state_dict(state["schedule"])


def lr_factor(config: OptimizerConfig, step: int, steps: int) -> float:
    """Learning rate at `step` as a share of its peak: linear warm-up, then constant, or linear or cosine decay to 0.

    Args:
        config: of the optimiser.
        step: counted from 0.
        steps: of the whole training.
    """
    warmup = round(config.warmup_fraction * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)  # the first step already learns, and the one after the warm-up has the peak
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    if config.schedule == "constant":
        return 1.0
    return 1.0 - progress if config.schedule == "linear" else 0.5 * (1.0 + float(np.cos(np.pi * progress)))
