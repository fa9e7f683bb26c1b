"""The stages of a run, each a function and an entry point of the same name; and the `rayrlhf` command."""

import sys

from jobs.rooms import foreign_actors

if fault := foreign_actors():
    print(f"rayrlhf: {fault}", file=sys.stderr)
    sys.exit(2)
