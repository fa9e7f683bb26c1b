"""Which micro-batch is TRL's best in each case of `ppo_step`: one PPO epoch each, in turns; prints and writes nothing.

The learning part decides: it comes four times in a step and once here.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

from benchmarks.harness import Child, alternate
from benchmarks.ppo_step import CASES, TRL
from benchmarks.workload import THREADS, write_reward_model

MICRO_BATCHES = (2, 4, 8, 16, 64)

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        reward_model = write_reward_model(Path(directory) / "reward_model")
        for case in CASES:
            print(case.name, flush=True)
            makers = {
                f"micro-batches of {rows}": partial(
                    Child, TRL, replace(case, trl_micro_batch=rows), reward_model, 1, threads=THREADS
                )
                for rows in MICRO_BATCHES
            }
            alternate(makers, [0])
