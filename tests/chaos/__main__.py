"""Faults at random moments of whole runs, which have to end as if nothing had happened.

    python -m tests.chaos --faults 100 --seed 0

A run is the shrunken quick start of tests/commands.py, in a setting that the seed decides: with one or two learner
ranks, in turn or with generation ahead of the learner, in a cluster of its own or on three nodes, with a slow network
or not. It meets a fault in each of its five stages. If the command ends, the same command is run again, as its user
would do. When the run is finished:

- in turn, all models, metrics and answers are those of an undisturbed run with as many ranks, to the last bit;
- the ledger has every step once, no prompt twice, and tokens of an allowed age;
- no process of it is left.

The first thing that is not so ends everything with exit code 1. Faults of runs that held, and what became of them, go
to chaos.jsonl, and tables to standard output. What the commands print stays beside chaos.jsonl. The same command with
the same `--directory` goes on behind the last run there.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import shutil
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import tests.environment  # noqa: F401 - before what reads it
from tests.chaos.checks import check
from tests.chaos.faults import draw
from tests.chaos.report import tables
from tests.chaos.runs import Run, limited_disk
from tests.chaos.settings import Setting, draw_setting


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=100, help="end with the run that meets this many")
    parser.add_argument("--seed", type=int, default=0, help="decides which faults there are, and when")
    parser.add_argument("--directory", type=Path, help="of runs and chaos.jsonl; default: a temporary one")
    arguments = parser.parse_args()
    # Power cuts tear lines of metrics, which are read several times a second.
    logging.getLogger("rayrlhf.runs.metrics").setLevel(logging.ERROR)
    directory = (arguments.directory or Path(tempfile.mkdtemp(prefix="chaos-"))).absolute()
    directory.mkdir(parents=True, exist_ok=True)
    written = directory / "chaos.jsonl"
    shutil.rmtree(directory / "runs", ignore_errors=True)  # of a chaos that was killed
    with limited_disk(directory) as (runs, disk):
        undisturbed = dict[int, Run]()
        records = [json.loads(line) for line in written.read_text().splitlines()] if written.exists() else []
        number = records[-1]["run"] + 1 if records else 0
        while len(records) < arguments.faults:
            chance = random.Random(f"{arguments.seed} {number}")
            setting = draw_setting(chance)
            if setting.ranks not in undisturbed:
                undisturbed[setting.ranks] = _undisturbed(runs, setting.ranks)
            model = undisturbed[setting.ranks]
            run = Run(runs, f"run{number}", setting.changes, setting.environment, setting.nodes)
            met = run.to_the_end(draw(chance, disk, setting.nodes), chance, model.stage_seconds())
            wrong = check(run, model, exact=not setting.ahead)
            if wrong:
                kept = directory / run.path.name  # not on the disk that is about to be unmounted
                shutil.copytree(run.path, kept, dirs_exist_ok=True)
                sys.exit(f"run {number} did not end as if nothing had happened: {'; '.join(wrong)}")
            for record in met:
                record |= {"run": number, "run_seconds": run.seconds, "undisturbed_seconds": model.seconds}
                record |= {"steps_done_again": run.steps_done_again(), "setting": asdict(setting)}
            with written.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(record) + "\n" for record in met)
            records += met
            print(f"run {number}, {setting}: {len(met)} faults, {run.seconds:.0f} s, {len(records)} in all", flush=True)
            run.delete()
            number += 1
    print(tables(records))


def _undisturbed(runs: Path, ranks: int) -> Run:
    """A run that meets no fault, to compare others with."""
    run = Run(runs, f"undisturbed{ranks}", Setting(ranks).changes)
    run.to_the_end()
    print(f"undisturbed, learner ranks: {ranks}: {run.seconds:.0f} s", flush=True)
    return run


if __name__ == "__main__":
    main()
