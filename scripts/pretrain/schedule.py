"""How far pre-training has come, when it ends, and the learning rate on the way.

Warm-up, stable, decay: Hu et al. 2024, MiniCPM.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Budget:
    """When the run ends, and where its learning rate begins to fall."""

    unit: str
    """`tokens` or `seconds`, both of training."""
    amount: float
    """Infinite: the run ends when it is told to."""
    decay: float
    """The last share of it, in which the learning rate falls."""


@dataclass(frozen=True)
class Position:
    """How far the run has come: with the weights, all that goes into a checkpoint."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    epoch: int = 0
    next: int = 0
    """The first window of the epoch that was not trained on."""
    decay_from: float | None = None
    """What of the budget was spent when the learning rate began to fall."""

    def spent(self, budget: Budget) -> float:
        return float(getattr(self, budget.unit))

    def ends(self, budget: Budget) -> bool:
        return self.spent(budget) >= budget.amount

    def decays(self, budget: Budget) -> bool:
        """Whether the learning rate should fall from here on."""
        return self.spent(budget) >= budget.amount * (1 - budget.decay)

    def rate(self, budget: Budget, warmup: int) -> float:
        """The learning rate of the next step, as a share of the highest."""
        rate = min(1.0, (self.steps + 1) / warmup)
        if self.decay_from is None:
            return rate
        return rate * max(0.0, (budget.amount - self.spent(budget)) / (budget.amount - self.decay_from))
