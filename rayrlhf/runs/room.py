"""Whether the disk has room for what a run will write, which is models and checkpoints for the most part."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from rayrlhf.config import Config
from rayrlhf.errors import UserError
from rayrlhf.runs.stages import stages_of

_WEIGHT = 4
"""Bytes of a weight in a model directory: float32."""
_TRAINED = 12
"""Bytes of a trained weight in a checkpoint: itself and two moments of Adam, float32."""
_CLOSE = 1.1
"""Room for so many times the estimate is not close: logs, samples and tables are not in it."""


class Need(NamedTuple):
    """Bytes that a run has still to write."""

    least: int
    """The models that its stages leave."""
    likely: int
    """These, and all checkpoints that are kept, with the one that is being written."""


def needed(config: Config, done: Collection[str], frozen: int, trained: int, kept: int) -> Need:
    """What the stages of a run write that are not done.

    Args:
        config: of the run.
        done: names of the stages that have finished.
        frozen: parameters of the policy that stay as they are; reward and value model count as if they had as many.
        trained: its other ones.
        kept: checkpoints of a stage that stay; `rl` has its own number in the config.
    """
    ahead = [stage.name for stage in stages_of(config) if stage.trains and stage.name not in done]
    sizes = {name: _TRAINED * trained * (2 if name == "rl" and config.rl.critic else 1) for name in ahead}
    models = len(ahead) * _WEIGHT * (frozen + trained)
    if config.model.lora:  # the adapters stand beside the merged model
        models += len(ahead) * _WEIGHT * trained
    staying = sum(size * (config.rl.keep_checkpoints if name == "rl" else kept) for name, size in sizes.items())
    return Need(models, models + staying + max(sizes.values(), default=0))


def check_room(directory: Path, need: Need, there: int = 0) -> tuple[str, bool]:
    """Compare what is needed with what is free.

    Args:
        directory: of the run, on this machine.
        need: of the run.
        there: bytes of its checkpoints that are there already, which new ones replace.

    Returns:
        A line with both numbers, and whether the estimate is close to what is free or above.

    Raises:
        UserError: not even the models fit.
    """
    free = shutil.disk_usage(directory).free
    line = f"{size(need.likely)} to write (models and checkpoints), {size(free)} free in {directory}"
    if need.least > free:
        raise UserError(
            f"disk: {size(need.least)} of models alone to write, {size(free)} free in {directory}; make room, or put "
            "runs_dir on another disk"
        )
    return f"disk: about {line}", _CLOSE * need.likely > free + there


def size(count: int) -> str:
    """Bytes in words.

    >>> size(1_500_000), size(2 * 10**9)
    ('1.5 MB', '2.0 GB')
    """
    return f"{count / 1e9:,.1f} GB" if count >= 10**9 else f"{count / 1e6:.1f} MB"
