"""Free disk before a run: the sizes of models and checkpoints, by hand."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from rayrlhf.config_file import parse_config
from rayrlhf.errors import UserError
from rayrlhf.runs.room import Need, check_room, needed

KEPT = 2


def test_models_and_checkpoints_of_the_stages_that_are_left() -> None:
    """1,000 weights: a model has 4,000 bytes, a checkpoint 12,000, that of PPO with its value model 24,000."""
    config = parse_config({"name": "a", "rl": {"algorithm": "ppo", "keep_checkpoints": 3}}, "test")
    # sft, reward_model and rl; two, two and three checkpoints, and one of rl while it is written.
    models, checkpoints = 3 * 4_000, 2 * 12_000 + 2 * 12_000 + 3 * 24_000 + 24_000
    assert needed(config, [], 0, 1_000, KEPT) == Need(models, models + checkpoints)
    assert needed(config, ["sft", "reward_model"], 0, 1_000, KEPT) == Need(4_000, 4_000 + 4 * 24_000)
    assert needed(config, ["sft", "reward_model", "rl"], 0, 1_000, KEPT) == Need(0, 0)


def test_adapters_are_all_that_a_checkpoint_has() -> None:
    """Of 1,000 weights 10 are adapters': they stand in the merged model and beside it."""
    settings = {"name": "a", "stages": ["sft"], "model": {"lora": {"rank": 2, "alpha": 4}}}
    config = parse_config(settings, "test")
    assert needed(config, [], 990, 10, KEPT) == Need(4_000 + 40, 4_000 + 40 + 3 * 120)


class Usage(NamedTuple):
    free: int


@pytest.mark.parametrize(
    ("free", "there", "close"), [(2_000, 0, False), (1_101, 0, False), (1_099, 0, True), (999, 200, False)]
)
def test_a_close_fit_is_told_from_a_wide_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, there: int, close: bool
) -> None:
    """Old checkpoints make room for new ones."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(free * 10**6))
    line, found = check_room(tmp_path, Need(10**8, 10**9), there * 10**6)
    assert found is close and line.startswith("disk: about 1.0 GB to write") and str(tmp_path) in line
    assert "\n" not in line


def test_what_surely_has_no_room_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(3 * 10**9))
    with pytest.raises(UserError, match=r"disk: 4\.0 GB of models alone to write, 3\.0 GB free in .*; make room"):
        check_room(tmp_path, Need(4 * 10**9, 5 * 10**9))
