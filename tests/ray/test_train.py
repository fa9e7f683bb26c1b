"""What `fit` does when a loop's numbers stop being finite: one attempt, one line, the last checkpoint kept."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.training.fit import fit, report, restored
from rayrlhf.config import LearnerConfig
from rayrlhf.models.ranks import Ranks

pytestmark = pytest.mark.timeout(180)


def diverging_loop(arguments: dict[str, Any]) -> None:
    """A weight that doubles until its square overflows float32; a checkpoint a step, attempts counted in a file."""
    ranks = Ranks(threads=1)
    with (arguments["directory"] / f"attempts-{ranks.rank}").open("a") as file:
        file.write("x")
    weight = torch.tensor(1.0)
    with restored() as checkpoint:
        if checkpoint:
            weight = torch.load(checkpoint / "weight.pt")
    while True:
        weight = weight * 1e10
        total = ranks.sum(weight.double() * torch.isfinite(weight.square()))
        if not total:
            raise FloatingPointError("the gradient norm is inf")
        report(ranks, {}, lambda directory, at=weight: torch.save(at, directory / "weight.pt"))  # type: ignore[misc]


@pytest.mark.parametrize(("local", "workers"), [(True, 1), (False, 2)])
def test_not_finite_stops_at_once_and_keeps_the_last_checkpoint(
    ray_cluster: None, tmp_path: Path, local: bool, workers: int
) -> None:
    learner = LearnerConfig(workers=workers, cpus=0.5, max_failures=1)
    arguments = {"directory": tmp_path}
    with pytest.raises(FloatingPointError, match="the gradient norm is inf; the last good checkpoint is ") as raised:
        fit(
            diverging_loop,
            arguments,
            name="ppo",
            storage=tmp_path / "checkpoints",
            learner=learner,
            keep_checkpoints=1,
            local=local,
        )
    kept = re.search(r"checkpoint is (\S+)$", str(raised.value))
    assert kept and torch.load(Path(kept[1]) / "weight.pt") == pytest.approx(1e10)
    for rank in range(workers):
        assert (tmp_path / f"attempts-{rank}").read_text() == "x", "a restart would only arrive there again"


def test_without_a_checkpoint_it_says_so(tmp_path: Path) -> None:
    def loop(arguments: dict[str, Any]) -> None:
        raise FloatingPointError("a score of the batch is not finite")

    with pytest.raises(FloatingPointError, match="is not finite; there was no checkpoint yet"):
        fit(loop, {}, name="ppo", storage=tmp_path, learner=LearnerConfig(), keep_checkpoints=1, local=True)
