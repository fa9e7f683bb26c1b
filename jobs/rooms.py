"""Checks that Python would import our own `actors` package.

The name is common: another package `actors` earlier on `sys.path` would be imported in place of ours.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path


def foreign_actors() -> str | None:
    """Say in one line that `actors` is missing or is somebody else's; None if it is ours. Imports nothing."""
    home = Path(__file__).resolve().parent.parent
    spec = importlib.util.find_spec("actors")
    if spec is None:
        return f"package 'actors' is missing beside jobs in {home}: install rayrlhf again"
    found = Path(spec.origin or next(iter(spec.submodule_search_locations or ()), "")).resolve()
    if home / "actors" not in (found, found.parent):
        return (
            f"package 'actors' would be imported from {found}, not from {home / 'actors'}: "
            "a foreign package has the same name; uninstall it or take it off PYTHONPATH"
        )
    return None
