"""What finished stages have written is known by its hashes: in a directory, in a store, and where a stage starts."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.stage import run as run_stages
from jobs.stage import stage
from rayrlhf import files
from rayrlhf.config_file import parse_config
from rayrlhf.errors import UserError
from rayrlhf.files import fingerprint
from rayrlhf.runs import outputs
from rayrlhf.runs.folder import RunFolder
from tests.s3 import KEYS, S3, serving
from tests.unit.test_checkpoints import flip


def with_outputs(address: Path | str) -> RunFolder:
    """A run that has finished `sft`, a directory, and `collect`, a file with another one beside it."""
    run = RunFolder(address)
    run.path.mkdir(parents=True, exist_ok=True)
    with run.writing("sft") as directory:
        (directory / "model.safetensors").write_bytes(bytes(range(256)) * 40)
        (directory / "adapters").mkdir()
        (directory / "adapters" / "config.json").write_text('{"rank": 2}')
    run.labeller.write_text('{"cost": 0.25}')
    run.upload(run.labeller)
    with run.writing("collect") as file:
        file.write_bytes(b"PAR1" * 100)
    return run


def test_every_file_of_every_stage_is_in_the_record(tmp_path: Path) -> None:
    run = with_outputs(tmp_path)
    recorded = json.loads((tmp_path / "outputs.json").read_text())
    assert {stage: {*files} for stage, files in recorded.items()} == {
        "sft": {"sft/model.safetensors", "sft/adapters/config.json"},
        "collect": {"comparisons.parquet", "labeller.json"},
    }
    assert recorded["collect"]["comparisons.parquet"]["bytes"] == 400
    assert run.outputs.damage("sft") is run.outputs.damage("collect") is None


def test_one_flipped_bit_is_found_wherever_it_is(tmp_path: Path) -> None:
    """60 bits of each file, each flipped and flipped back."""
    run = with_outputs(tmp_path)
    rng = np.random.default_rng(0)
    for stage_, recorded in json.loads((tmp_path / "outputs.json").read_text()).items():
        for name, content in recorded.items():
            for bit in rng.integers(8 * content["bytes"], size=60).tolist():
                flip(tmp_path / name, bit)
                assert run.outputs.damage(stage_) == f"{name} is not what was written"
                flip(tmp_path / name, bit)
        assert run.outputs.damage(stage_) is None


def test_files_that_were_found_whole_are_read_again_once_they_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run asks up to four times for the SFT model, which may be many GB."""
    run, read = with_outputs(tmp_path), list[Path]()

    def noted(path: Path) -> dict[str, Any]:
        read.append(path)
        return fingerprint(path)

    monkeypatch.setattr(files, "fingerprint", noted)
    monkeypatch.setattr(outputs, "_SETTLED_S", -1.0)  # as if the files had been written long ago
    for _ in range(3):
        assert run.outputs.damage("sft") is None
    assert len(read) == 2, "each of the two files once"
    os.utime(run.sft / "model.safetensors", (1, 1))
    assert run.outputs.damage("sft") is None and len(read) == 4
    monkeypatch.setattr(outputs, "_SETTLED_S", 3600.0)
    assert run.outputs.damage("sft") is None and len(read) == 6, "too new: a write could leave its times as they are"


def test_files_that_are_gone_or_cut_short(tmp_path: Path) -> None:
    run = with_outputs(tmp_path)
    run.comparisons.write_bytes(run.comparisons.read_bytes()[:-1])
    assert run.outputs.damage("collect") == "comparisons.parquet is not what was written"
    (run.sft / "adapters" / "config.json").unlink()
    assert run.outputs.damage("sft") == "sft/adapters/config.json is missing"
    assert run.outputs.damage("rl") is None, "nothing is known of it"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"sft": 3}'])
def test_a_record_that_cannot_be_read(tmp_path: Path, text: str) -> None:
    run = with_outputs(tmp_path)
    run.outputs.path.write_text(text)
    with pytest.raises(UserError, match=r"outputs.json: is damaged \(.*; delete it to go on without knowing"):
        run.outputs.damage("sft")


def test_a_stage_does_not_start_from_a_damaged_model(tmp_path: Path) -> None:
    config = parse_config({"name": "one", "runs_dir": str(tmp_path)}, "test")
    ran = []

    @stage("collect")
    def collect(session: object) -> None:
        ran.append(session)

    run = with_outputs(tmp_path / "one")
    run.comparisons.unlink()
    flip(run.sft / "model.safetensors", 1234)
    with pytest.raises(UserError) as raised:
        run_stages(config, [collect], local=True)
    assert str(raised.value) == (
        f"{tmp_path}/one: what stage 'sft' has written is damaged (sft/model.safetensors is not what was written); "
        f"copy that file back, or delete {tmp_path}/one/sft and run the same command again, which makes it anew"
    )
    assert not ran
    flip(run.sft / "model.safetensors", 1234)
    run_stages(config, [collect], local=True)
    assert len(ran) == 1


@pytest.fixture(scope="module")
def server() -> Iterator[S3]:
    with serving() as s3:
        yield s3


def test_in_a_store(server: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy that is damaged on one node only is fetched again; what is damaged in the store is named."""
    for key, value in KEYS.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("RAYRLHF_CACHE", str(tmp_path))
    run = with_outputs(server.uri("runs/kept"))
    whole = (run.sft / "model.safetensors").read_bytes()
    flip(run.sft / "model.safetensors", 77)
    flip(run.labeller, 3)
    assert run.outputs.damage("sft") is run.outputs.damage("collect") is None
    assert (run.sft / "model.safetensors").read_bytes() == whole

    shutil.rmtree(run.path)
    assert run.outputs.damage("sft") is None, "another node"
    flip(run.sft / "model.safetensors", 77)
    run.upload(run.sft)
    assert run.outputs.damage("sft") == "sft/model.safetensors is not what was written"
