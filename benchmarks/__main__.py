"""All benchmarks, one after the other, each in a process of its own: `python -m benchmarks [--quick]`."""

from __future__ import annotations

import subprocess
import sys

NAMES = (
    "ppo_step",
    "grpo_step",
    "learner",
    "generator",
    "weight_sync",
    "overlap",
    "control_plane",
    "actor_manager",
    "sft",
    "reward_model",
    "dpo",
    "command",
    "gpu",
    "phases",
)

if __name__ == "__main__":
    failed = []
    for name in NAMES:
        print(f"== {name}", flush=True)
        if subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *sys.argv[1:]], check=False).returncode:
            failed.append(name)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")
