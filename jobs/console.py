"""Where the commands print."""

from __future__ import annotations

import sys

from rich.console import Console

# A log has no width of its own, and tables need one.
console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 120)
