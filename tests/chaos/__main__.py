"""Faults at random moments of whole runs, which have to end as if nothing had happened.

    python -m tests.chaos --faults 100 --seed 0
    python -m tests.chaos --faults 30 --ahead      # generation up to two steps ahead of the learner

A run is the shrunken quick start of tests/commands.py. It meets a fault in each of its five stages, and every fourth
run has a slow network besides. If the command ends, the same command is run again, as its user would do. When the run
is finished:

- in turn, all models, metrics and answers are those of the undisturbed run, to the last bit;
- the ledger has every step once, no prompt twice, and tokens of an allowed age;
- no process of it is left.

The first thing that is not so ends everything with exit code 1. Faults, and what became of them, go to chaos.jsonl, and
tables to standard output. What the commands print stays beside chaos.jsonl.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import tests.environment  # noqa: F401 - before what reads it
from tests.chaos.checks import check
from tests.chaos.faults import SLOW_NETWORK, SLOW_SHARE, draw
from tests.chaos.report import tables
from tests.chaos.runs import Run, limited_disk


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=100, help="end with the run that meets this many")
    parser.add_argument("--seed", type=int, default=0, help="decides which faults there are, and when")
    parser.add_argument("--ahead", action="store_true", help="rl.max_staleness=2")
    parser.add_argument("--ranks", type=int, default=1, help="learner ranks")
    parser.add_argument("--directory", type=Path, help="where runs and chaos.jsonl go; default: a temporary one")
    arguments = parser.parse_args()
    directory = (arguments.directory or Path(tempfile.mkdtemp(prefix="chaos-"))).absolute()
    directory.mkdir(parents=True, exist_ok=True)
    changes = ["rl.steps=6", "rl.checkpoint_every=1"]
    changes += ["rl.max_staleness=2"] if arguments.ahead else []
    changes += [f"resources.learner.workers={arguments.ranks}"] if arguments.ranks > 1 else []
    with limited_disk(directory) as (runs, disk):
        undisturbed = Run(runs, "undisturbed", changes)
        undisturbed.to_the_end()
        print(f"undisturbed: {undisturbed.seconds:.0f} s", flush=True)
        records, number = list[dict[str, Any]](), 0
        while len(records) < arguments.faults:
            chance = random.Random(f"{arguments.seed} {number}")
            faults, slow = draw(chance, disk), chance.random() < SLOW_SHARE
            run = Run(runs, f"run{number}", changes, SLOW_NETWORK if slow else {})
            met = run.to_the_end(faults, chance, undisturbed.stage_seconds())
            wrong = check(run, undisturbed, exact=not arguments.ahead)
            for record in met:
                record |= {"run": number, "run_seconds": run.seconds, "undisturbed_seconds": undisturbed.seconds}
                record |= {"steps_done_again": run.steps_done_again(), "slow_network": slow}
                with (directory / "chaos.jsonl").open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
            records += met
            network = ", with a slow network" if slow else ""
            print(f"run {number}: {len(met)} faults, {run.seconds:.0f} s{network}, {len(records)} in all", flush=True)
            if wrong:
                shutil.copytree(run.path, directory / run.path.name)  # from a disk that is about to be unmounted
                sys.exit(f"run {number} did not end as if nothing had happened: {'; '.join(wrong)}")
            run.delete()
            number += 1
    print(tables(records))


if __name__ == "__main__":
    main()
