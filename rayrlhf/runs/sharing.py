"""A run that begins with finished stages of another one: a sweep's trial, and a run whose config has `from`.

Outputs are written once and never changed. So a hard link to each file is as good as a copy, in a directory and in the
node's copy of a store. Into a store, the outputs are uploaded as those of any stage.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection
from pathlib import Path

from rayrlhf.config import Config
from rayrlhf.errors import UserError
from rayrlhf.files import replacing
from rayrlhf.runs.addresses import as_typed
from rayrlhf.runs.changes import sentence
from rayrlhf.runs.contents import Contents
from rayrlhf.runs.folder import RunFolder, changes_since, run_at
from rayrlhf.runs.labels import share_labels
from rayrlhf.runs.reading import sound
from rayrlhf.runs.stages import STAGES, stages_of


def share(base: RunFolder, run: RunFolder, stages: Collection[str]) -> None:
    """Let `run` start with `stages` of `base` done: with their outputs, the files beside them, and their lines of
    metrics.jsonl. What `run` has already stays.

    Raises:
        UserError: a file of `base` was damaged since it was written.
    """
    with run.lock():
        # What the config's files held when the stages were done: the run is bound to it from now on.
        for path in (base.metrics, base.contents):
            content = base.read(path)
            if content is not None and run.read(run.path / path.name) is None:
                _put(run, path.name, _lines_of(content, stages) if path == base.metrics else content)
        for stage in stages:
            if run.done(stage):
                continue
            base.require_whole(stage)
            for name in STAGES[stage].beside:
                if (content := base.read(base.path / name)) is not None:
                    _put(run, name, content)
            if stage == "collect":
                share_labels(base, run)
            output = base.download(base.output(stage))
            with run.writing(stage) as temporary:
                if temporary.is_dir():
                    shutil.copytree(output, temporary, copy_function=_link, dirs_exist_ok=True)
                else:
                    _link(output, temporary)


def take_over(run: RunFolder, config: Config, contents: Contents) -> str:
    """Let a run start with what the run of its `from` has finished, as far as nothing that went into it differs.

    It happens once; `shared.json` of the run folder says what was taken over.

    Args:
        run: a folder that this process has locked.
        config: the run's.
        contents: of the files that `config` names.

    Returns:
        What became of it, in one line.

    Raises:
        UserError: `from` names no run folder, or the run itself.
    """
    assert config.start is not None, "the caller looks"
    other = run_at(config.start)
    if other.path == run.path:
        raise UserError(f"from: {config.start} is this run; give it another name (name=OTHER)")
    place = as_typed(other.address)
    if (recorded := run.read(run.shared)) is not None:
        with sound(run.address_of(run.shared)):
            before = json.loads(recorded)
            source, stages = before["from"], ", ".join(before["stages"])
        if source == other.address:
            return f"from {place}: {stages or 'nothing'} was taken over before"
    if other.read(other.config) is None:
        raise UserError(f"from: {config.start}: no run folder (it has no config.yaml)")
    if own := [stage.name for stage in stages_of(config) if run.done(stage.name)]:
        return f"from {place}: nothing is taken over, since this run has finished {', '.join(own)} itself"
    shared, because = _equal_stages(other, config, contents)
    share(other, run, shared)
    left = [stage.name for stage in stages_of(config)][len(shared) :]
    record = {"from": other.address, "stages": shared, "own": left, "because": because}
    _put(run, run.shared.name, (json.dumps(record, indent=1) + "\n").encode())
    taken = f"{', '.join(shared) or 'nothing'} {'are' if len(shared) > 1 else 'is'} taken over"
    return f"from {place}: {taken}" + (f"; {', '.join(left)} anew: {because}" if left else "")


def _equal_stages(other: RunFolder, config: Config, contents: Contents) -> tuple[list[str], str | None]:
    """The first stages of a run that another run has finished alike, and why the next one is not among them."""
    changes = changes_since(other, config, contents)
    shared: list[str] = []
    for stage in stages_of(config):
        if changed := [change for change in changes if stage.name in change.stages]:
            return shared, sentence(changed)
        if not other.done(stage.name):
            return shared, f"that run has not finished {stage.name}"
        shared.append(stage.name)
    return shared, None


def _lines_of(metrics: bytes, stages: Collection[str]) -> bytes:
    """The lines of a metrics.jsonl that are about these stages."""
    kept = []
    for line in metrics.splitlines(keepends=True):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):  # torn by a kill
            continue
        if not isinstance(entry, dict):
            continue
        of = entry.get("stage")
        if of in stages or (of == "run" and any(f"time/{stage}" in entry for stage in stages)):
            kept.append(line)
    return b"".join(kept)


def _put(run: RunFolder, name: str, content: bytes) -> None:
    path = run.path / name
    with replacing(path) as temporary:
        temporary.write_bytes(content)
    run.upload(path)


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)
