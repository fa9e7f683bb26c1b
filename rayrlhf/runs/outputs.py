"""The record of what the finished stages have written, by which a later one sees that a file was damaged since.

`outputs.json` of a run folder has the size and hash of every file that a stage has published, and of the files beside
its output:

    {"sft": {"sft/config.json": {"bytes": 812, "blake2b": "5f0c..."}, "sft/model.safetensors": {...}, ...},
     "collect": {"comparisons.parquet": {...}, "labeller.json": {...}}, ...}

An entry is written before the output appears, so an output that is there is in the record.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayrlhf.files import difference, fingerprint, fingerprints, replacing
from rayrlhf.runs.addresses import join
from rayrlhf.runs.reading import read_json
from rayrlhf.runs.stages import STAGES

if TYPE_CHECKING:
    from rayrlhf.runs.storage import Store  # imports pyarrow, for which a directory need not wait

NAME = "outputs.json"
_SETTLED_S = 2.0


class Outputs:
    """`outputs.json` of one run folder."""

    def __init__(self, folder: Path, store: Store | None) -> None:
        """
        Args:
            folder: the run folder, or this node's copy of it.
            store: where the folder is, if it is in a store.
        """
        self.folder, self.store = folder, store
        self.path = folder / NAME
        self._whole: dict[str, list[tuple[int, ...]]] = {}
        """What the file system said of a stage's files when they were found whole, by stage."""

    def record(self, stage: str, output: Path) -> None:
        """Note what is in the output of `stage` before it is published, and in the files beside it.

        Args:
            output: the file or directory, still under another name.
        """
        name = STAGES[stage].output
        if output.is_dir():
            found = {f"{name}/{file}": content for file, content in fingerprints(output).items()}
        else:
            found = {name: fingerprint(output)}
        for beside in STAGES[stage].beside:
            if (self.folder / beside).is_file():
                found[beside] = fingerprint(self.folder / beside)
        with replacing(self.path) as temporary:
            temporary.write_text(json.dumps(self._read() | {stage: found}, indent=1) + "\n", encoding="utf-8")
        if self.store:
            self.store.upload(self.path)

    def damage(self, stage: str) -> str | None:
        """What is wrong with the files of a finished stage, in words; None if they are as they were written.

        Nothing is known of a stage that an earlier version has finished. In a store, this node's copy is made the
        newest version first. A copy that is damaged is fetched again. Files that were found whole are not read again
        until one of them changes: up to four stages of a run ask for the same model.

        Raises:
            UserError: `outputs.json` is damaged.
        """
        expected = self._read().get(stage)
        if expected is None:
            return None
        self._download(expected)
        state = self._state(expected)
        if state and state == self._whole.get(stage):
            return None
        fault = difference(self.folder, expected)
        if fault and self.store:
            for name in _tops(expected):
                _remove(self.folder / name)
            self._download(expected)
            state = self._state(expected)
            fault = difference(self.folder, expected)
        if not fault:
            self._whole[stage] = state
        return fault

    def _state(self, expected: dict[str, Any]) -> list[tuple[int, ...]]:
        """What changes when somebody writes to one of the files, without reading them.

        Empty if one is not there, or is so new that a further write might leave its times as they are: file systems
        count them in steps of some milliseconds.
        """
        try:
            found = [(self.folder / name).stat() for name in expected]
        except OSError:
            return []
        if any(time.time() - each.st_ctime < _SETTLED_S for each in found):
            return []
        return [(each.st_ino, each.st_size, each.st_mtime_ns, each.st_ctime_ns) for each in found]

    def _download(self, expected: dict[str, Any]) -> None:
        for name in _tops(expected) if self.store else ():
            assert self.store
            self.store.download(self.folder / name)

    def _read(self) -> dict[str, Any]:
        address = str(self.path)
        if self.store:
            address = join(self.store.address, NAME)
            text = self.store.read(self.store.remote(self.path))
        else:
            text = self.path.read_bytes() if self.path.is_file() else None
        return {} if text is None else read_json(text, address, dict[str, dict[str, Any]])


def _tops(expected: dict[str, Any]) -> list[str]:
    """The files and directories in the run folder that hold what is expected."""
    return list(dict.fromkeys(name.partition("/")[0] for name in expected))


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
