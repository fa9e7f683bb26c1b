"""Whether rounds help: three rounds against one with as many comparisons and RL steps, seed by seed.

    .venv/bin/python scripts/rounds_against_once.py runs/rounds 0 1 2

Both runs of a seed have the same SFT model, and their policies answer the same test prompts. The same command goes on
after an interruption.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from rayrlhf.config_file import load_config
from rayrlhf.reports.intervals import over_runs, p_text, paired_difference, pooled
from rayrlhf.resampling import Interval
from rayrlhf.runs.folder import run_at
from rayrlhf.runs.rounds import newest_round

CONFIG = Path(__file__).parents[1] / "configs/rounds.yaml"


def once(seed: int, runs: Path, config: Path = CONFIG) -> list[str]:
    """What follows `rayrlhf run` for one round with all comparisons and all steps."""
    own = load_config(config)
    assert own.rounds is not None
    prompts, steps = own.rounds.count * own.collect.prompts, own.rounds.count * own.rl.steps
    changes = ["rounds=null", f"collect.prompts={prompts}", f"rl.steps={steps}"]
    return [str(config), f"runs_dir={runs}", f"name=once-{seed}", f"seed={seed}", *changes]


def in_rounds(seed: int, runs: Path, config: Path = CONFIG) -> list[str]:
    """What follows `rayrlhf run` for the rounds; all of them, so that both runs make as many steps."""
    changes = ["rounds.stop=false", f"from={runs / f'once-{seed}'}"]
    return [str(config), f"runs_dir={runs}", f"name=rounds-{seed}", f"seed={seed}", *changes]


def gold(run: Path) -> np.ndarray:
    """[n] gold of the final policy's answers to the test prompts, in the order of their ids."""
    table = pq.read_table(newest_round(run_at(run)).samples).sort_by("id")
    return table.column("gold_policy").to_numpy()


def compare(runs: Path, seeds: list[int]) -> list[str]:
    """The lines to print: gold of rounds minus gold of one round, for each seed and pooled."""
    differences = [gold(runs / f"rounds-{seed}") - gold(runs / f"once-{seed}") for seed in seeds]
    lines = []
    for seed, difference in zip(seeds, differences, strict=True):
        found = paired_difference(difference, np.zeros_like(difference))
        assert found is not None
        lines.append(f"seed {seed}: {_text(found)}, {p_text(found.p)}")
    together = pooled(np.stack(differences))
    assert together is not None
    lines.append(f"pooled over {len(seeds)} seeds and their prompts: {_text(together)}")
    if len(seeds) > 1:
        lines.append(f"over seeds (t): {_text(over_runs([float(np.nanmean(each)) for each in differences]))}")
    return lines


def _text(found: Interval) -> str:
    return f"{found.mean:+.4f} [{found.low:+.4f}, {found.high:+.4f}] (n = {found.n})"


def main() -> None:
    runs, *seeds = sys.argv[1:]
    where, numbers = Path(runs).absolute(), [int(seed) for seed in seeds]
    for seed in numbers:
        for arguments in (once(seed, where), in_rounds(seed, where)):
            # The command of this installation, which need not be on the PATH.
            subprocess.run([Path(sys.executable).with_name("rayrlhf"), "run", *arguments], check=True)
    print("gold, three rounds minus one round with as many comparisons and steps:")
    print(*compare(where, numbers), sep="\n")


if __name__ == "__main__":
    main()
