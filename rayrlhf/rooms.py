"""The doorway of the `rayrlhf` command: are `actors` and `jobs` ours?

The two names are common. A package of that name that comes first on `sys.path` would be imported in place of ours,
so the command starts here, where nothing has been imported from either, and not in `jobs`.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

from rayrlhf.errors import UserError

ROOMS = ("actors", "jobs")


def check_rooms() -> None:
    """See that `actors` and `jobs` would be imported from the folder that holds `rayrlhf`. Imports neither.

    Raises:
        UserError: one of them is missing, or another package of that name comes first on `sys.path`.
    """
    home = Path(__file__).resolve().parent.parent
    for room in ROOMS:
        spec = importlib.util.find_spec(room)
        if spec is None:
            raise UserError(f"package {room!r} is missing beside rayrlhf in {home}: install rayrlhf again")
        found = Path(spec.origin or next(iter(spec.submodule_search_locations or ()), "")).resolve()
        if home / room not in (found, found.parent):
            raise UserError(
                f"package {room!r} would be imported from {found}, not from {home / room}: "
                "a foreign package has the same name; uninstall it or take it off PYTHONPATH"
            )


def main() -> None:
    """Entry point of the `rayrlhf` command: check the rooms, then hand over to `jobs.cli`."""
    try:
        check_rooms()
    except UserError as error:
        print(f"rayrlhf: {error}", file=sys.stderr)
        sys.exit(2)
    importlib.import_module("jobs.cli").main()
