"""The folder of a run: its paths, which stages are done, its config of record, and its lock.

A stage is done exactly if its output exists; outputs appear by one rename, after their files have reached the disk. So
a killed stage, or a power cut, leaves nothing that looks finished. `outputs.json` has the size and hash of every file
of the finished stages, by which a later stage sees that one was damaged since. Only the process that holds
`RunFolder.lock` writes into the folder.

A run in a store (`rayrlhf.runs.storage`) has the same files. Every process works on its node's copy: it uploads the
files that it has written, and downloads those of other processes. In a directory that every node sees, both do nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shlex
import shutil
import socket
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from rayrlhf.config import Config
from rayrlhf.config_file import dump_config, parse_config
from rayrlhf.errors import UserError
from rayrlhf.files import replacing, sync, sync_tree
from rayrlhf.runs.addresses import as_typed, is_uri, join
from rayrlhf.runs.changes import Change, config_changes, content_changes, sentence
from rayrlhf.runs.contents import Contents, parse_contents
from rayrlhf.runs.outputs import Outputs
from rayrlhf.runs.stages import STAGES, stages_of
from rayrlhf.runs.stores import holder_of, lease, open_store, store_errors
from rayrlhf.terminal import say
from rayrlhf.yaml_text import read_yaml_text, write_yaml_text

log = logging.getLogger(__name__)

_held: dict[Path, int] = {}
"""Run folders that this process has locked, and how many times."""


class RunFolder:
    """`runs_dir/name`: a directory that every node of the run sees, or this node's copy of a folder in a store."""

    def __init__(self, address: str | Path) -> None:
        self.address = str(address)
        """An absolute path, or the URI of the folder in a store."""
        self.store = open_store(self.address)
        self.path = self.store.copy if self.store else Path(address)
        if not self.path.is_absolute():
            raise UserError(f"run folder {self.address!r} is relative; give an absolute runs_dir (runs_dir=/abs/path)")
        self.config = self.path / "config.yaml"
        self.contents = self.path / "contents.json"
        self.outputs = Outputs(self.path, self.store)
        """What is in the outputs of the finished stages."""
        self.shared = self.path / "shared.json"
        self.metrics = self.path / "metrics.jsonl"
        self.report = self.path / "report.html"
        self.sft = self.path / "sft"
        self.reward_model = self.path / "reward_model"
        self.dpo = self.path / "dpo"
        self.policy = self.path / "policy"
        self.reward_accuracy = self.path / "reward_model.json"
        self.heldout_pairs = self.path / "heldout_pairs.parquet"
        self.comparisons = self.path / "comparisons.parquet"
        self.labeller = self.path / "labeller.json"
        # A copy's files that its store lacks are deleted, but for hidden ones; this one grows here.
        self.labels = self.path / (".labels.sqlite" if self.store else "labels.sqlite")
        """What people say of answers, on this machine (`rayrlhf.runs.labels`)."""
        self.labels_copy = self.path / "labels.sqlite"
        """In a store, a copy of `labels`."""
        self.to_rank = self.path / "to_rank.jsonl"
        """Answers that wait for the rankings of people."""
        self.samples = self.path / "samples.parquet"
        self.dev_samples = self.path / "samples"
        """Answers to a few dev prompts while `rl` ran: `step_000020.jsonl` and so on."""
        self.tokens = self.path / "tokens.jsonl"
        """A few trajectories that `rl` learnt from last, token by token."""
        self.trained = self.path / "trained.jsonl"
        """Which prompts `rl` has learnt from, step by step."""
        self.evaluation = self.path / "evaluation.json"
        self.errors = self.path / "errors.log"
        """The whole of each failure, which the command tells in one line (`rayrlhf.runs.error_log`)."""
        self.checkpoints = self.path / "checkpoints"

    @property
    def name(self) -> str:
        return self.path.name

    def output(self, stage: str) -> Path:
        """The file or directory that the stage of that name writes."""
        return self.path / STAGES[stage].output

    def done(self, stage: str) -> bool:
        """Whether the output of `stage` exists."""
        return self.store.exists(self.output(stage)) if self.store else self.output(stage).exists()

    def address_of(self, path: Path) -> str:
        """The address by which any node finds a file or directory of the folder, with `storage.local_copy`."""
        return join(self.address, *path.relative_to(self.path).parts)

    def upload(self, *paths: Path) -> None:
        """Make the store's versions of these files and directories those of the copy, one after the other.

        What the copy lacks is deleted there.
        """
        if self.store:
            for path in paths:
                self.store.upload(path)

    def download(self, path: Path) -> Path:
        """Make this node's copy of a file or directory the newest version; returns `path`."""
        return self.store.download(path) if self.store else path

    def read(self, path: Path) -> bytes | None:
        """The content of a file at the run's address; None if there is no such file.

        In a store, the node's copy is neither used nor changed: it may be the one that the run's processes work on.
        """
        if self.store:
            return self.store.read(self.store.remote(path))
        return path.read_bytes() if path.is_file() else None

    def download_files(self) -> None:
        """Download all files directly in the folder; directories, which are large, wait until they are asked for."""
        if self.store:
            self.store.pull_files()

    def directories_in(self, path: Path) -> list[str]:
        """Names of the directories inside a directory of the folder that are complete; none if it does not exist."""
        if self.store:
            return self.store.directories_in(path)
        return [each.name for each in path.glob("[!.]*") if each.is_dir()]

    def remove(self, path: Path) -> None:
        """Delete a directory of the folder, here and in the store."""
        if self.store:
            self.store.remove(path)
        shutil.rmtree(path, ignore_errors=True)

    @contextlib.contextmanager
    def writing(self, stage: str) -> Iterator[Path]:
        """A temporary path that becomes the stage's output when the block ends without an error.

        It is an empty directory; where the stage's output is a file, the block creates a file at it. If the block
        raises, the temporary is removed, and an earlier output stays.
        """
        output = self.output(stage)
        with replacing(output, directory=STAGES[stage].output_is_directory) as temporary:
            yield temporary
            sync_tree(temporary)
            self.outputs.record(stage, temporary)
        sync(self.path)
        self.upload(output)

    def require_whole(self, stage: str) -> None:
        """See that the files of a finished stage are as they were written, before anything is made of them.

        Raises:
            UserError: one was damaged since; the message names it.
        """
        if fault := self.outputs.damage(stage):
            output = self.address_of(self.output(stage))
            raise UserError(
                f"{self.address}: what stage {stage!r} has written is damaged ({fault}); copy that file back, or "
                f"delete {output} and run the same command again, which makes it anew"
            )

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for writing. A process that holds it may take it again, as a pipeline's stages do.

        Raises:
            UserError: another process holds it; the message names it.
        """
        if self.path in _held:
            _held[self.path] += 1
            try:
                yield
            finally:
                _held[self.path] -= 1
            return
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("a+", encoding="utf-8") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                handle.seek(0)
                holder = handle.read().strip() or "another process"
                raise UserError(
                    f"{self.path} is being written by {holder}; wait for it, end it, or choose another name"
                ) from None
            except OSError as error:
                raise UserError(
                    f"{self.path}: its file system has no locks ({error.strerror}); mount it with them, or put "
                    "runs_dir elsewhere"
                ) from None
            handle.truncate(0)
            handle.write(f"process {os.getpid()} on {socket.gethostname()}")
            handle.flush()
            with lease(self.store):
                _held[self.path] = 1
                try:
                    yield
                finally:
                    del _held[self.path]
                    handle.truncate(0)

    def note_in_lock(self, more: str) -> None:
        """Add to what other processes read about this one, which holds the lock: in `holder` and in their errors."""
        with (self.path / ".lock").open("a", encoding="utf-8") as handle:
            handle.write(f", {more}")

    def holder(self) -> str | None:
        """The process that holds the folder for writing, in words; None if none does.

        In a store, a process that died on another machine counts as its holder until the next one locks the folder.
        """
        if self.store:
            return holder_of(self.store)
        if not (self.path / ".lock").exists():
            return None
        with (self.path / ".lock").open(encoding="utf-8") as handle:
            try:
                # Shared, so that two that look at the same time do not take each other for the holder.
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return handle.read().strip() or "another process"
            except OSError:
                return None
        return None


def run_at(address: str | Path) -> RunFolder:
    """The run folder at a URI, or at a path, which may be relative or begin with `~`."""
    return RunFolder(address if is_uri(address) else os.path.abspath(Path(address).expanduser()))


def run_folders(runs_dir: str | Path) -> list[RunFolder]:
    """The run folders in `runs_dir`, a directory or the URI of a store, by name.

    Raises:
        UserError: there is no such directory, or the store does not answer.
    """
    store = open_store(runs_dir)
    if store is None:
        directory = Path(os.path.abspath(Path(runs_dir).expanduser()))
        if not directory.is_dir():
            raise UserError(f"{runs_dir}: no such directory; give the one that holds the run folders")
        return [RunFolder(path.parent) for path in sorted(directory.glob("*/config.yaml"))]
    with store_errors(store):
        names = store.folders_with("config.yaml")
    if names is None:
        raise UserError(f"{store.address}: no such folder in the store; give the one that holds the run folders")
    return [RunFolder(join(store.address, name)) for name in names]


def open_or_create(
    config: Config, runs_dir: str | Path, redo: Collection[str] = (), contents: Contents | None = None
) -> RunFolder:
    """The folder of this run, with `config` as its config.yaml, and with `contents` as its contents.json.

    A stored config must agree with `config` in every key that went into a finished stage, and stored contents with
    `contents`. `model`, `data` and `seed` went into all stages, a stage's own section into that stage and those after
    it. Other keys and contents may change, and the new ones replace the stored ones.

    Args:
        config: what this run is to do.
        runs_dir: an absolute path or a URI, see `runs_address`.
        redo: stages whose output is about to be written anew, whose old config values may therefore change.
        contents: of the files that `config` names; None leaves the stored ones as they are.

    Raises:
        UserError: a key or a content that went into a finished stage has changed, the stored config cannot be read, or
            another process holds the folder.
    """
    run = RunFolder(join(runs_dir, config.name))
    with run.lock():
        run.download_files()
        if run.config.exists():
            changes = changes_since(run, config, contents)
            _refuse_changes_of_finished_stages(run, config, changes, redo)
            for change in changes:
                log.info("%s: %s", run.name, change.words)
            if said := sentence(change for change in changes if change.content):
                say(f"{said}: stages that are not finished begin anew with it")
        _write(run, run.config, write_yaml_text(dump_config(config), sort_keys=False))
        if contents:
            # What is not there now stays known: it may come back as another file.
            _write(run, run.contents, json.dumps(stored_contents(run) | contents, indent=1) + "\n")
    return run


def changes_since(run: RunFolder, config: Config, contents: Contents | None = None) -> list[Change]:
    """How a config, and the contents that it names, differ from those that are stored in a run folder.

    Raises:
        UserError: the stored config cannot be read.
    """
    changed = config_changes(dump_config(stored_config(run)), dump_config(config))
    named = {change.key for change in changed}  # another path, whose content is another one as a matter of course
    return changed + [c for c in content_changes(stored_contents(run), contents or {}) if c.key not in named]


def stored_config(run: RunFolder) -> Config:
    """The config of record.

    Raises:
        UserError: it cannot be read.
    """
    path = run.address_of(run.config)
    try:
        tree = read_yaml_text((run.read(run.config) or b"").decode())
    except ValueError:
        tree = None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: the stored config is not readable; delete it, or choose another name (name=...)")
    return parse_config(tree, path)


def stored_contents(run: RunFolder) -> Contents:
    """What the files that the config of record names held; nothing in a run folder of an earlier version."""
    return parse_contents(run.read(run.contents), run.address_of(run.contents))


def _refuse_changes_of_finished_stages(
    run: RunFolder, config: Config, changes: Sequence[Change], redo: Collection[str]
) -> None:
    finished = [stage for stage in STAGES if stage not in redo and run.done(stage)]
    bound = [change for change in changes if {*change.stages} & {*finished}]
    if not bound:
        return
    stage = next(stage for stage in finished if stage in bound[0].stages)
    old = "content" if bound[0].content else "value"
    shared = not any(stages_of(config)[0].name in change.stages for change in bound)
    rest = f" from={shlex.quote(as_typed(run.address))}" if shared and run.done(stages_of(config)[0].name) else ""
    raise UserError(
        f"{run.address_of(run.config)}: {sentence(bound)}, but stage {stage!r} is already done with the old {old}; "
        f"put it back, delete {run.address}, or begin another run{' that shares the rest' if rest else ''}: "
        f"name=OTHER{rest}"
    )


def _write(run: RunFolder, path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    run.upload(path)
