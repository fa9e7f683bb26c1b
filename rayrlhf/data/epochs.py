"""Which rows an optimiser step uses: a pure function of (seed, step), so nothing about it has to be saved."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rayrlhf.trajectory import derive_seed


@dataclass(frozen=True)
class Epochs:
    """`epochs` passes over `count` rows, each in a fresh permutation, cut into global batches of `batch_size`.

    The last batch of an epoch may be smaller; every row is used exactly once an epoch.
    """

    count: int
    batch_size: int
    epochs: int
    evals_per_epoch: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.count // self.batch_size)

    @property
    def steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    def batch(self, step: int) -> list[int]:
        """Row indices of optimiser step `step`, counted from 0."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order = np.random.default_rng(derive_seed(self.seed, "epoch", epoch)).permutation(self.count)
        return [int(i) for i in order[place * self.batch_size : (place + 1) * self.batch_size]]

    def evaluates_after(self, step: int) -> bool:
        """Whether an evaluation follows step `step`: `evals_per_epoch` times, evenly, and at the end of each epoch."""
        done, per_epoch = step % self.steps_per_epoch + 1, self.steps_per_epoch
        return done * self.evals_per_epoch // per_epoch > (done - 1) * self.evals_per_epoch // per_epoch
