"""The stages of a run, each a function and an entry point of the same name; and the `rayrlhf` command."""

import sys

from jobs.rooms import foreign_actors
from rayrlhf.terminal import complain

if fault := foreign_actors():
    complain(f"rayrlhf: {fault}")
    sys.exit(2)
