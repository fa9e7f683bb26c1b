"""Which trackers there are, and whether one can work, before anything is spent."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

from rayrlhf.errors import UserError
from rayrlhf.tracking.base import Tracker


class _Entry(NamedTuple):
    kind: str
    """The class, in the module `rayrlhf.tracking.NAME`."""
    extra: str | None
    """Of this package, that installs the tracker's own; None where it is always there."""


TRACKERS = {
    "tensorboard": _Entry("TensorBoardTracker", None),
    "wandb": _Entry("WandbTracker", "wandb"),
    "mlflow": _Entry("MlflowTracker", "mlflow"),
}
"""By the names of the config's `tracking`."""


def check_trackers(names: Sequence[str]) -> None:
    """Look whether the trackers of a run can work.

    Raises:
        UserError: a package is not installed, or its own settings lack something.
    """
    for name in names:
        extra = TRACKERS[name].extra
        if extra is None:
            continue
        if importlib.util.find_spec(name) is None:
            raise UserError(f"tracking: {name} is not installed; pip install 'rayrlhf[{extra}]', or leave it out")
        _module(name).check()


def make_tracker(name: str) -> Tracker:
    """A tracker that is not open yet."""
    return cast(Tracker, getattr(_module(name), TRACKERS[name].kind)())


def _module(name: str) -> Any:
    return importlib.import_module(f"rayrlhf.tracking.{name}")
