"""Which checkpoint SFT keeps, by a table made by hand."""

from __future__ import annotations

import pytest

from actors.training.sft import Progress


@pytest.mark.parametrize(
    ("evaluations", "kept", "stale"),
    [
        # (score, dev loss) of each evaluation, counted from 0
        ([(0.0, 3.1), (0.0, 2.5), (0.0, 1.8)], 2, 0),  # ROUGE says nothing, and the loss falls
        ([(0.0, 1.8), (0.0, 2.5), (0.0, 1.9)], 0, 2),
        ([(0.2, 1.8), (0.1, 1.7), (0.3, 2.0)], 2, 0),  # ROUGE decides where it differs
        ([(0.2, 1.8), (0.2, 1.8)], 0, 1),
        ([(-1.9, 1.9), (-1.7, 1.7), (-1.8, 1.8)], 1, 1),  # without generators the score is minus the loss
    ],
)
def test_equal_scores_are_decided_by_the_dev_loss(
    evaluations: list[tuple[float, float]], kept: int, stale: int
) -> None:
    progress = Progress()
    improved = [i for i, (score, loss) in enumerate(evaluations) if progress.improves(score, loss)]
    assert improved[-1] == kept and progress.stale == stale
    assert (progress.best, progress.loss) == evaluations[kept]
