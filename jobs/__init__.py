"""The stages of a run, each a function and an entry point of the same name; and the `rayrlhf` command."""

import sys

from jobs.rooms import foreign_actors

if fault := foreign_actors():
    print(f"rayrlhf: {fault}", file=sys.stderr)  # noqa: T201 - the package that prints may be what is missing
    sys.exit(2)
