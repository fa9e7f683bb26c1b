"""Checkpoints are whole, or are known to be damaged: every bit of every file counts, in a directory and in a store."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from rayrlhf.errors import UserError
from rayrlhf.runs.checkpoints import MANIFEST, Checkpoints, damage
from rayrlhf.runs.folder import RunFolder
from tests.s3 import KEYS, S3, serving


def filled(text: str) -> Callable[[Path], None]:
    def write(directory: Path) -> None:
        (directory / "state.pt").write_bytes(text.encode() * 100)
        (directory / "policy").mkdir()
        (directory / "policy" / "model.safetensors").write_bytes(bytes(range(256)) * 40)

    return write


def checkpoints(path: Path | str, keep: int = 2) -> Checkpoints:
    return Checkpoints(RunFolder(path), "rl-1a2b", keep)


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def test_the_newest_is_found_and_the_oldest_go(tmp_path: Path) -> None:
    own = checkpoints(tmp_path)
    assert own.newest() == (None, [])
    assert [own.save(filled(text)) for text in "abc"] == [0, 1, 2]
    assert own.numbers() == [1, 2]
    assert checkpoints(tmp_path).newest() == (2, [])
    assert (own.read(2) / "state.pt").read_text() == "c" * 100


def test_one_flipped_bit_is_found_wherever_it_is(tmp_path: Path) -> None:
    """60 bits of each file, the manifest among them, each flipped and flipped back."""
    own = checkpoints(tmp_path)
    directory = own.read(own.save(filled("a")))
    rng = np.random.default_rng(0)
    for path in [path for path in directory.rglob("*") if path.is_file()]:
        for bit in rng.integers(8 * path.stat().st_size, size=60).tolist():
            flip(path, bit)
            assert damage(directory), f"bit {bit} of {path.name}"
            flip(path, bit)
    assert damage(directory) is None


@pytest.mark.parametrize("fault", ["missing file", "cut short", "longer", "no manifest", "empty manifest", "flipped"])
def test_the_one_before_a_damaged_one_is_taken_and_the_damaged_one_named(tmp_path: Path, fault: str) -> None:
    own = checkpoints(tmp_path)
    for text in "ab":
        own.save(filled(text))
    newest = own.read(1)
    model, manifest = newest / "policy" / "model.safetensors", newest / MANIFEST
    damages: dict[str, Callable[[], object]] = {
        "missing file": model.unlink,
        "cut short": lambda: model.write_bytes(model.read_bytes()[:-1]),
        "longer": lambda: model.write_bytes(model.read_bytes() + b"x"),
        "no manifest": manifest.unlink,
        "empty manifest": lambda: manifest.write_text(""),
        "flipped": lambda: flip(model, 12345),
    }
    damages[fault]()
    again = checkpoints(tmp_path)
    number, said = again.newest()
    assert number == 0
    (line,) = said
    assert line.startswith(f"{newest} is damaged (") and ("manifest" in line) == ("manifest" in fault)
    with pytest.raises(UserError, match="is damaged"):
        again.read(1)
    # What is written next takes the damaged one's place among those that are kept.
    assert again.save(filled("c")) == 2
    assert again.numbers() == [0, 2]


def test_all_damaged_is_an_error_that_loses_nothing(tmp_path: Path) -> None:
    own = checkpoints(tmp_path)
    for text in "ab":
        own.save(filled(text))
        (own.read(own.numbers()[-1]) / "state.pt").unlink()
    with pytest.raises(UserError, match=r"no checkpoint is whole: .*000001 is damaged.*000000 is damaged") as raised:
        checkpoints(tmp_path).newest()
    assert f"delete {tmp_path}/checkpoints/rl-1a2b to start the stage anew" in str(raised.value)
    assert own.numbers() == [0, 1]


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path) -> None:
    own = checkpoints(tmp_path)
    own.save(filled("a"))

    def fail(directory: Path) -> None:
        (directory / "state.pt").write_text("half")
        raise OSError("no space left on device")

    with pytest.raises(OSError):
        own.save(fail)
    assert [path.name for path in (tmp_path / "checkpoints" / "rl-1a2b").iterdir()] == ["checkpoint_000000"]


@pytest.fixture(scope="module")
def server() -> Iterator[S3]:
    with serving() as s3:
        yield s3


def test_in_a_store(server: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one node saved another one reads; a copy that is damaged on one node only is fetched again."""
    for key, value in KEYS.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("RAYRLHF_CACHE", str(tmp_path / "one"))
    address = server.uri("runs/kept")
    own = checkpoints(address)
    for text in "abc":
        own.save(filled(text))
    assert own.numbers() == [1, 2]
    flip(own.read(2) / "state.pt", 3)
    assert own.newest() == (2, []), "the store's is whole"
    assert (own.read(2) / "state.pt").read_text() == "c" * 100

    shutil.rmtree(tmp_path / "one")
    assert own.newest() == (2, []) and (own.read(2) / "state.pt").read_text() == "c" * 100
    assert {name.split("/")[0] for name in server.objects("runs/kept/checkpoints/rl-1a2b/")} == {
        "checkpoint_000001", "checkpoint_000002"
    }  # fmt: skip
