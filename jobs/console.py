"""Where the commands print, and warn."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import rich.text
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from rayrlhf.runs.folder import RunFolder
from rayrlhf.runs.metrics import MetricsWriter
from rayrlhf.runs.stages import STAGES
from rayrlhf.terminal import printable

# Rich takes bells and the like out of a text when it is made. Whatever else a terminal would obey has to be replaced
# there, too: it counts as no cell wide, so a table that is measured with it would cut off what follows.
rich.text.strip_control_codes = printable  # type: ignore[attr-defined, assignment]


class PlainConsole(Console):
    """Rich's console that shows every text as it is: `[red]` and `:x:` are no markup, and escape sequences are seen."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """What is shown of a text, table or panel. Control segments are rich's own, such as those of a bar.

        This holds whatever the rich that is installed does with its texts.
        """
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


# A log has no width of its own, and tables need one.
console = PlainConsole(soft_wrap=True, width=None if sys.stdout.isatty() else 120)


def warn(where: Console, text: str) -> None:
    """Print a warning in one line."""
    where.print(Text.assemble(("warning: ", "bold yellow"), text), soft_wrap=True)


def warn_of_stage(run: RunFolder, stage: str, text: str) -> None:
    """Print a warning outside a stage's loop, and keep it for `rayrlhf status` and the report."""
    warn(console, text)
    with MetricsWriter(run.address) as metrics:
        metrics.warn("run", list(STAGES).index(stage), [text])
