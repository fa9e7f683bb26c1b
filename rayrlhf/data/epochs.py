"""The rows that each optimiser step uses: a pure function of (seed, step), so a checkpoint need not hold any of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rayrlhf.trajectory import derive_seed


@dataclass(frozen=True)
class Epochs:
    """Passes over all rows, each in a new order, cut into batches for all ranks together.

    Every row is used exactly once in an epoch; the last batch of an epoch may be smaller.
    """

    count: int
    batch_size: int
    """Rows of a step, over all workers."""
    epochs: int
    evals_per_epoch: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Batches in an epoch."""
        return -(-self.count // self.batch_size)  # division that rounds up

    @property
    def steps(self) -> int:
        """Batches in all epochs."""
        return self.epochs * self.steps_per_epoch

    def batch(self, step: int) -> list[int]:
        """Indices of the rows of optimiser step `step`, counted from 0."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order = np.random.default_rng(derive_seed(self.seed, "epoch", epoch)).permutation(self.count)
        return [int(i) for i in order[place * self.batch_size : (place + 1) * self.batch_size]]

    def evaluates_after(self, step: int) -> bool:
        """Whether an evaluation follows step `step`, counted from 0.

        Evaluations are spread evenly over an epoch, and the last one follows its last step. With 10 steps in an epoch
        and 4 evaluations they follow the 3rd, 5th, 8th and 10th step.
        """
        done, per_epoch = step % self.steps_per_epoch + 1, self.steps_per_epoch
        # An evaluation is due when the number of due evaluations rises with this step; whole numbers cannot drift.
        return done * self.evals_per_epoch // per_epoch > (done - 1) * self.evals_per_epoch // per_epoch
