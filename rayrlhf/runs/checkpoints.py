"""The checkpoints of one training: directories that are whole, or are known to be damaged.

    checkpoints/rl-1a2b3c4d/checkpoint_000007/state.pt
                                               manifest.json     written last: the size and hash of every other file

A checkpoint appears by one rename, after its files and its manifest have reached the disk. Whoever reads one compares
every file with the manifest, so that a flipped bit, a missing file or a file cut short is never trained on. The newest
whole checkpoint is taken; a damaged one is named, and removed when the next one is written.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rayrlhf.errors import UserError
from rayrlhf.files import difference, fingerprints, replacing, sync_tree
from rayrlhf.runs.folder import RunFolder

MANIFEST = "manifest.json"
_PREFIX = "checkpoint_"


class Checkpoints:
    """`checkpoints/NAME/checkpoint_N` of a run folder, N counted from 0. One process writes, any number read."""

    def __init__(self, run: RunFolder, name: str, keep: int) -> None:
        """
        Args:
            name: marks the settings that the training has, see `jobs.session.Session.checkpoint_name`.
            keep: how many checkpoints stay; with two, a damaged one costs the steps since the one before it.
        """
        self.run, self.directory, self.keep = run, run.checkpoints / name, keep
        self._damaged: set[int] = set()
        self._found: int | None = None
        """What `newest` has just found whole: `read` need not hash it again."""

    def numbers(self) -> list[int]:
        """The checkpoints that are there, whole or damaged, oldest first."""
        names = self.run.directories_in(self.directory)
        return sorted(int(n.removeprefix(_PREFIX)) for n in names if n.removeprefix(_PREFIX).isdigit())

    def address(self, number: int) -> str:
        """The path or URI of a checkpoint, for messages."""
        return self.run.address_of(self._path(number))

    def newest(self) -> tuple[int | None, list[str]]:
        """The newest whole checkpoint, and one line about each damaged one that is newer. None if there is none at all.

        Raises:
            UserError: there are checkpoints, and all of them are damaged. Starting anew would lose them in silence.
        """
        faults: list[str] = []
        for number in reversed(self.numbers()):
            fault = self._damage(number)
            if fault is None:
                self._found = number
                return number, faults
            self._damaged.add(number)
            faults.append(f"{self.address(number)} is damaged ({fault})")
        if faults:
            raise UserError(
                f"no checkpoint is whole: {'; '.join(faults)}; copy one back, or delete "
                f"{self.run.address_of(self.directory)} to start the stage anew"
            )
        return None, []

    def read(self, number: int) -> Path:
        """The directory of a checkpoint, on this node.

        Raises:
            UserError: it is damaged, on this node at least.
        """
        if number != self._found and (fault := self._damage(number)):
            raise UserError(f"{self.address(number)} is damaged ({fault}); delete it and run the same command again")
        return self._path(number)

    def save(self, write: Callable[[Path], None]) -> int:
        """Write the next checkpoint: `write(directory)` fills an empty directory. Returns its number.

        Checkpoints beyond the newest `keep` are removed afterwards, and so are damaged ones.
        """
        before = self.numbers()
        number = before[-1] + 1 if before else 0
        with replacing(self._path(number), directory=True) as directory:
            write(directory)
            manifest = {"files": fingerprints(directory)}
            (directory / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
            sync_tree(directory)  # before the rename: after a power cut the name must not be all that is left
        self.run.upload(self._path(number))
        whole = [n for n in [*before, number] if n not in self._damaged]
        for old in {*before} - {*whole[-self.keep :]}:
            self.run.remove(self._path(old))
        self._damaged.clear()
        return number

    def _damage(self, number: int) -> str | None:
        fault = damage(self.run.download(self._path(number)))
        if fault and self.run.store:  # perhaps only the copy in this node's cache is
            shutil.rmtree(self._path(number))
            fault = damage(self.run.download(self._path(number)))
        return fault

    def _path(self, number: int) -> Path:
        return self.directory / f"{_PREFIX}{number:06d}"


def damage(directory: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None if every file is as the manifest says."""
    try:
        files: dict[str, Any] = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))["files"]
        if fault := difference(directory, files):
            return fault
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (ValueError, KeyError, TypeError, AttributeError):  # flipped bits in the manifest itself
        return f"{MANIFEST} cannot be read"
    return None if files else f"{MANIFEST} names no file"
