"""The check that `actors` is ours, in fresh interpreters with foreign packages first on sys.path."""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from jobs import rooms


def start(env: Mapping[str, str], *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", *flags, "-c", "import jobs"]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


def test_our_own_actors_pass() -> None:
    assert rooms.foreign_actors() is None


@pytest.mark.parametrize("file", ["actors/__init__.py", "actors.py"])
def test_foreign_actors_are_named_in_one_line_and_never_run(tmp_path: Path, file: str) -> None:
    foreign = tmp_path / file
    foreign.parent.mkdir(exist_ok=True)
    foreign.write_text("raise SystemExit('the foreign code ran')\n")
    result = start(os.environ | {"PYTHONPATH": f"{tmp_path}:{Path(rooms.__file__).parents[1]}"})
    assert result.returncode == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"rayrlhf: package 'actors' would be imported from {foreign}, not from ")


@pytest.fixture
def alone(tmp_path: Path) -> Path:
    """A copy of `jobs` without its neighbours."""
    copy = tmp_path / "library" / "jobs"
    copy.mkdir(parents=True)
    for name in ("__init__.py", "rooms.py"):
        shutil.copy(Path(rooms.__file__).with_name(name), copy)
    return copy.parent


def test_missing_actors_are_named(alone: Path) -> None:
    result = start({"PYTHONPATH": str(alone)}, "-S")  # without site-packages
    assert result.returncode == 2
    assert result.stderr == f"rayrlhf: package 'actors' is missing beside jobs in {alone}: install rayrlhf again\n"


def test_bare_folder_of_that_name_is_foreign(alone: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere" / "actors").mkdir(parents=True)
    result = start({"PYTHONPATH": f"{alone}:{tmp_path / 'elsewhere'}"}, "-S")
    assert result.returncode == 2
    assert f"would be imported from {tmp_path / 'elsewhere' / 'actors'}, not from {alone / 'actors'}" in result.stderr
