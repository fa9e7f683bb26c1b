"""Whether a run that met faults ended as if nothing had happened."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pyarrow.parquet as pq

from rayrlhf.config_file import load_config
from rayrlhf.runs.folder import RunFolder
from rayrlhf.runs.ledger import read_ledger
from tests.chaos.runs import Run
from tests.golden import golden_numbers

MODELS = ("sft", "reward_model", "policy")


def check(run: Run, undisturbed: Run, exact: bool) -> list[str]:
    """What is wrong with a finished run, one line each; none is as it should be.

    Args:
        exact: whether two runs of its config are equal to the last bit. Ahead of the learner they are up to `rl`.
    """
    faults = [f"{len(run.left)} processes are left: {run.left[0]}"] if run.left else []
    for name in MODELS if exact else MODELS[:-1]:
        files = [each.path / name / "model.safetensors" for each in (run, undisturbed)]
        if files[0].read_bytes() != files[1].read_bytes():
            faults.append(f"{name} has other weights")
    if pq.read_table(run.path / "comparisons.parquet") != pq.read_table(undisturbed.path / "comparisons.parquet"):
        faults.append("comparisons.parquet differs")
    if exact and _numbers(run) != _numbers(undisturbed):
        faults.append("metrics, evaluation or answers differ")
    return faults + check_ledger(RunFolder(run.path))


def _numbers(run: Run) -> dict[str, Any]:
    """What the run has computed; how many actors were replaced is what the faults were for."""
    numbers = golden_numbers(run.path)
    for lines in numbers["stages"].values():
        for line in lines:
            line.pop("rollout/replacements", None)
    return numbers


def check_ledger(run: RunFolder) -> list[str]:
    """What is wrong with what `rl` has learnt from, one line each.

    The run must have fewer prompts than it draws, or each of them is drawn again in a later pass.
    """
    rl = load_config(run.config).rl
    ledger = read_ledger(run)
    faults = []
    if [line["step"] for line in ledger] != list(range(1, rl.steps + 1)):
        faults.append(f"the ledger has steps {[line['step'] for line in ledger]}")
    for line in ledger:
        groups = line["groups"]
        if [len(groups), *{group["samples"] for group in groups}] != [rl.prompts_per_step, rl.samples_per_prompt]:
            faults.append(f"step {line['step']} has {len(groups)} prompts, or another number of samples")
        oldest, newest = min(group["oldest"] for group in groups), max(group["newest"] for group in groups)
        if oldest < line["version"] - rl.max_staleness or newest > line["version"]:
            faults.append(f"step {line['step']} has tokens of versions {oldest} to {newest}, and is {line['version']}")
    drawn = Counter(group["prompt"] for line in ledger for group in line["groups"])
    faults += [f"{prompt} was learnt from {count} times" for prompt, count in drawn.items() if count > 1]
    return faults
