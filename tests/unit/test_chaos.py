"""The parts of `python -m tests.chaos` that need no run: which faults are drawn, and what its checks find."""

from __future__ import annotations

import itertools
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from rayrlhf.config_file import dump_config, parse_config
from rayrlhf.runs.folder import RunFolder
from tests.chaos.checks import check_ledger
from tests.chaos.faults import IN_STAGE, Fault, draw, strike
from tests.chaos.report import tables
from tests.chaos.settings import Setting, draw_setting


def test_a_seed_decides_the_faults_and_every_kind_and_role_comes_up() -> None:
    assert draw(random.Random("0 7"), disk=True, nodes=True) == draw(random.Random("0 7"), disk=True, nodes=True)
    drawn = [fault for number in range(300) for fault in draw(random.Random(f"0 {number}"), disk=True, nodes=True)]
    assert [fault.stage for fault in drawn[:5]] == list(IN_STAGE)
    for stage, roles in IN_STAGE.items():
        assert {fault.role for fault in drawn if fault.stage == stage and fault.kind == "kill"} == {*roles}
    assert {fault.kind for fault in drawn} == {"kill", "stop", "lost node", "power cut", "full disk"}
    assert all(0 <= fault.moment < 1 for fault in drawn)
    without = [fault for number in range(100) for fault in draw(random.Random(number), disk=False, nodes=False)]
    assert {fault.kind for fault in without} == {"kill", "stop", "power cut"}


def test_every_setting_comes_up() -> None:
    settings = [draw_setting(random.Random(number)) for number in range(4000)]
    assert settings[0] == draw_setting(random.Random(0))
    assert {(each.ranks, each.ahead, each.nodes, each.slow_network) for each in settings} == {
        (ranks, *others) for ranks in (1, 2) for others in itertools.product((False, True), repeat=3)
    }
    assert (
        "rl.max_staleness=2" in Setting(ahead=True).changes and str(Setting(2, nodes=True)) == "2 ranks, several nodes"
    )


def ledger(run: RunFolder, *lines: tuple[int, int, dict[str, tuple[int, int, int]]]) -> None:
    """Write lines of step, version, and prompts with samples, oldest and newest version."""
    with run.trained.open("w") as file:
        for step, version, prompts in lines:
            groups = [
                {"prompt": prompt, "samples": samples, "oldest": oldest, "newest": newest}
                for prompt, (samples, oldest, newest) in prompts.items()
            ]
            file.write(json.dumps({"step": step, "version": version, "groups": groups}) + "\n")


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    tree = {"rl": {"steps": 2, "prompts_per_step": 2, "samples_per_prompt": 2, "max_staleness": 1}}
    folder = RunFolder(tmp_path)
    folder.config.write_text(yaml.safe_dump(dump_config(parse_config({"name": "one", **tree}, "test"))))
    return folder


FIRST = (1, 1, {"a": (2, 1, 1), "b": (2, 1, 1)})


@pytest.mark.parametrize(
    ("second", "said"),
    [
        ((2, 2, {"c": (2, 1, 2), "d": (2, 2, 2)}), []),
        ((3, 2, {"c": (2, 2, 2), "d": (2, 2, 2)}), ["the ledger has steps [1, 3]"]),
        ((2, 2, {"c": (2, 2, 2), "a": (2, 2, 2)}), ["a was learnt from 2 times"]),
        ((2, 2, {"c": (2, 2, 2)}), ["step 2 has 1 prompts, or another number of samples"]),
        ((2, 2, {"c": (1, 2, 2), "d": (2, 2, 2)}), ["step 2 has 2 prompts, or another number of samples"]),
        ((2, 2, {"c": (2, 0, 2), "d": (2, 2, 2)}), ["step 2 has tokens of versions 0 to 2, and is 2"]),
        ((2, 2, {"c": (2, 2, 3), "d": (2, 2, 2)}), ["step 2 has tokens of versions 2 to 3, and is 2"]),
    ],
)
def test_what_is_wrong_with_a_ledger(run: RunFolder, second: Any, said: list[str]) -> None:
    ledger(run, FIRST, second)
    assert check_ledger(run) == said


def nobody() -> dict[int, str]:
    """The processes of a run of which nothing lives."""
    return {}


def test_a_power_cut_damages_the_newest_of_two_checkpoints(tmp_path: Path) -> None:
    lines = b'{"stage": "rl", "step": 1, "time": 1.0, "rl/loss": 2.0}\n' * 2
    (tmp_path / "metrics.jsonl").write_bytes(lines)
    states = [tmp_path / "checkpoints" / "rl-1a2b" / f"checkpoint_00000{n}" / "state.pt" for n in range(2)]
    for age, state in enumerate(reversed(states)):
        state.parent.mkdir(parents=True)
        state.write_bytes(bytes(1000))
        os.utime(state, (100 - age, 100 - age))
    said = strike(Fault("rl", "power cut"), nobody, tmp_path, random.Random(0))
    assert said == f"all processes, the last line of metrics.jsonl, and one bit of {states[1].relative_to(tmp_path)}"
    assert states[0].read_bytes() == bytes(1000)
    assert sum(byte.bit_count() for byte in states[1].read_bytes()) == 1
    left = (tmp_path / "metrics.jsonl").read_bytes()
    assert lines.startswith(left) and len(lines) // 2 < len(left) < len(lines)


def test_the_tables() -> None:
    def record(run: int, role: str, seconds: float, ended: str | None) -> dict[str, Any]:
        return {
            "run": run, "kind": "kill", "role": role, "stage": "rl", "recovered_s": seconds, "ended": ended,
            "run_seconds": 200.0, "undisturbed_seconds": 100.0, "steps_done_again": run + 1,
            "setting": {"ranks": 2, "ahead": False, "nodes": run == 0, "slow_network": True},
        }  # fmt: skip

    text = tables([record(0, "scorer", 10.0, None), record(0, "scorer", 30.0, None), record(1, "driver", 50.0, "-9: ")])
    assert "| kill scorer | 2 | 2 | 0 | 20 [10, 30] |" in text
    assert "| kill driver | 1 | 0 | 1 | 50 [50, 50] |" in text
    assert "3 faults, by stage: rl 3" in text
    assert "2 runs: two learner ranks 2, ahead 0, several nodes 1, slow network 2" in text
    assert "goodput (undisturbed seconds / seconds with faults): 0.50 [0.50, 0.50]" in text
    assert "steps done again: 3" in text
