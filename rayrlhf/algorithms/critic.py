"""The value model, its loss and its optimiser: a part of the algorithms that have a critic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from rayrlhf.algorithms.losses import ValueLoss, value_loss
from rayrlhf.algorithms.optimizer import Optimizer
from rayrlhf.config_rl import CriticConfig
from rayrlhf.models.batching import TokenBatch
from rayrlhf.models.forward import Forward


class Critic:
    """A model with a scalar head, which learns the returns."""

    def __init__(self, forward: Forward, config: CriticConfig, updates: int) -> None:
        """`updates` is the number of optimiser steps of the whole run, the length of the learning-rate schedule."""
        self.forward, self.config = forward, config
        self.optimizer = Optimizer(forward.model, config.optimizer, updates, lr=config.value_lr)

    def values(self, batch: TokenBatch) -> Sequence[Tensor]:
        """For each row of a batch, the values of the states in which its tokens were chosen."""
        return self.forward.values(batch).split(batch.counts)

    def backward(self, batch: TokenBatch, old_values: Tensor, returns: Tensor, tokens: int) -> ValueLoss:
        """Add a micro-batch's part to the gradient of the mean value loss, and return it without gradient.

        Args:
            batch: of N tokens.
            old_values: [N] before the first update.
            returns: [N] targets.
            tokens: of the mini-batch on all ranks.
        """
        config = self.config
        found = value_loss(self.forward.values(batch), old_values, returns, config.value_clip_range)
        (config.value_coefficient * found.loss.sum() / tokens).backward()
        return ValueLoss(found.loss.detach(), found.clipped)

    def state_dict(self) -> dict[str, Any]:
        """Of the optimiser and its schedule; the model is saved beside it."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state)
