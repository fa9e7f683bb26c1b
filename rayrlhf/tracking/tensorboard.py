"""TensorBoard: event files under the run folder's `tensorboard/STAGE`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayrlhf.tracking.base import Outcome, Tracked, numbers_of, texts_of

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from rayrlhf.runs.storage import Mirror


class TensorBoardTracker:
    """See `rayrlhf.tracking.base.Tracker`."""

    def __init__(self) -> None:
        self._boards: dict[str, SummaryWriter] = {}
        self._last: dict[str, int] = {}
        self._mirror: Mirror | None = None

    def open(self, run: Tracked, known: str | None) -> str | None:
        self._folder = run.path / "tensorboard"
        if "://" in run.address:
            from rayrlhf.runs.storage import Mirror

            self._mirror = Mirror(run.address, ["tensorboard/*/*"])
        return None

    def write(self, line: Mapping[str, Any]) -> None:
        stage, step = line["stage"], line["step"]
        board = self._board(stage, step)
        for name, value in numbers_of(line).items():
            board.add_scalar(name, value, step, line["time"])
        for name, text in texts_of(line).items():
            board.add_text(name, text, step, line["time"])
        board.flush()  # what is noted as handed over is to outlive a kill

    def finish(self, outcome: Outcome) -> None:
        """The event files stand beside samples and report."""

    def close(self) -> None:
        for board in self._boards.values():
            board.close()
        if self._mirror:
            self._mirror.close()

    def _board(self, stage: str, step: int) -> SummaryWriter:
        if step < self._last.get(stage, step):  # the stage began again at an earlier checkpoint
            self._boards.pop(stage).close()
        self._last[stage] = step
        if stage not in self._boards:
            from torch.utils.tensorboard import SummaryWriter  # takes seconds to import

            # purge_step hides what an earlier attempt wrote from this step on, as read_metrics does.
            _wait_for_a_later_name(self._folder / stage)
            self._boards[stage] = SummaryWriter(str(self._folder / stage), purge_step=step)
        return self._boards[stage]


def _wait_for_a_later_name(folder: Path) -> None:
    """Wait a second at most, so that a new file comes behind those that are there.

    TensorBoard reads files in the order of their names, `events.out.tfevents.SECONDS.HOST.PID.NUMBER`, where number 10
    stands before 9. An earlier attempt that is read after a later one would not be hidden by it.
    """
    newest = max((int(path.name.split(".")[3]) for path in folder.glob("events.out.tfevents.*")), default=0)
    time.sleep(min(max(newest + 1 - time.time(), 0.0), 1.0))
