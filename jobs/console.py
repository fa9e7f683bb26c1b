"""Where the commands print, and warn."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.text import Text

from rayrlhf.runs.folder import RunFolder
from rayrlhf.runs.metrics import MetricsWriter
from rayrlhf.runs.stages import STAGES

# A log has no width of its own, and tables need one.
console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 120)


def warn(where: Console, text: str) -> None:
    """Print a warning in one line. It is shown as it is: rich reads no markup in it."""
    where.print(Text.assemble(("warning: ", "bold yellow"), text), soft_wrap=True)


def warn_of_stage(run: RunFolder, stage: str, text: str) -> None:
    """Print a warning outside a stage's loop, and keep it for `rayrlhf status` and the report."""
    warn(console, text)
    with MetricsWriter(run.address) as metrics:
        metrics.warn("run", list(STAGES).index(stage), [text])
