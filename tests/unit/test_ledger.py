"""The ledger of prompts: what restarts and kills leave in it is read as what was learnt from."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from rayrlhf.runs.folder import RunFolder
from rayrlhf.runs.ledger import Ledger, read_ledger
from rayrlhf.trajectory import Trajectory


def trajectory(prompt: str, index: int, versions: list[int]) -> Trajectory:
    ids = np.arange(len(versions))
    return Trajectory(prompt, index, 0, ids, ids, np.zeros(len(ids), np.float32), np.array(versions, np.int64), "eos")


def step(ledger: Ledger, number: int, version: int, **prompts: list[list[int]]) -> None:
    trajectories = [trajectory(name, i, each) for name, samples in prompts.items() for i, each in enumerate(samples)]
    ledger.write(number, version, trajectories)


def test_versions_are_those_of_all_tokens_of_a_group(tmp_path: Path) -> None:
    ledger = Ledger(RunFolder(tmp_path))
    step(ledger, 1, 3, a=[[2, 2, 3], [3]], b=[[1], [2]])
    assert read_ledger(ledger.run) == [
        {
            "step": 1,
            "version": 3,
            "groups": [
                {"prompt": "a", "samples": 2, "oldest": 2, "newest": 3},
                {"prompt": "b", "samples": 2, "oldest": 1, "newest": 2},
            ],
        }
    ]


def test_what_a_restart_does_again_counts_once(tmp_path: Path) -> None:
    """Steps 3 and 4 are lost with a learner that restarts from the checkpoint of step 2, and is killed in a line."""
    run = RunFolder(tmp_path)
    assert read_ledger(run) == []
    first = Ledger(run)
    for number in (1, 2, 3, 4):
        step(first, number, number, **{f"early{number}": [[number]]})
    with run.trained.open("ab") as file:
        file.write(b'{"step": 5, "gro')
    second = Ledger(run)
    for number in (3, 4):
        step(second, number, number + 2, **{f"late{number}": [[number + 2]]})
    found = read_ledger(run)
    assert [(line["step"], line["version"], line["groups"][0]["prompt"]) for line in found] == [
        (1, 1, "early1"), (2, 2, "early2"), (3, 5, "late3"), (4, 6, "late4")
    ]  # fmt: skip
    whole = [json.loads(line) for line in run.trained.read_bytes().splitlines() if line.endswith(b"}")]
    assert len(whole) == 6, "nothing is deleted"
