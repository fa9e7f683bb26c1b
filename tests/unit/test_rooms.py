"""`check_rooms` in fresh interpreters, with foreign packages first on sys.path."""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from rayrlhf import rooms


def start(env: Mapping[str, str], *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", *flags, "-c", "from rayrlhf.rooms import main; main()"]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)


def test_our_own_rooms_pass() -> None:
    rooms.check_rooms()


@pytest.mark.parametrize("room", ["actors", "jobs"])
@pytest.mark.parametrize("file", ["{}/__init__.py", "{}.py"])
def test_foreign_room_is_named_in_one_line_and_never_run(tmp_path: Path, room: str, file: str) -> None:
    foreign = tmp_path / file.format(room)
    foreign.parent.mkdir(exist_ok=True)
    foreign.write_text("raise SystemExit('the foreign code ran')\n")
    result = start(os.environ | {"PYTHONPATH": str(tmp_path)})
    assert result.returncode == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"rayrlhf: package {room!r} would be imported from {foreign}, not from ")


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A copy of the library without its neighbours."""
    copy = tmp_path / "library" / "rayrlhf"
    copy.mkdir(parents=True)
    for name in ("__init__.py", "rooms.py", "errors.py"):
        shutil.copy(Path(rooms.__file__).with_name(name), copy)
    return copy.parent


def test_missing_room_is_named(library: Path) -> None:
    result = start({"PYTHONPATH": str(library)}, "-S")  # without site-packages
    assert result.returncode == 2
    assert result.stderr == f"rayrlhf: package 'actors' is missing beside rayrlhf in {library}: install rayrlhf again\n"


def test_bare_folder_of_that_name_is_foreign(library: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere" / "actors").mkdir(parents=True)
    result = start({"PYTHONPATH": f"{library}:{tmp_path / 'elsewhere'}"}, "-S")
    assert result.returncode == 2
    assert f"would be imported from {tmp_path / 'elsewhere' / 'actors'}, not from {library / 'actors'}" in result.stderr
