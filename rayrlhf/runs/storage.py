"""Stores: folders of any filesystem of pyarrow, such as an S3 bucket, and this node's copies of them.

A run is kept in a directory that every node sees, or in a store. The address of a store is a URI such as
`s3://bucket/runs/one`; options stand behind a question mark (`?endpoint_override=http://host:port`, see
`pyarrow.fs.FileSystem.from_uri`).

Every node works on a copy in its cache. A process writes into the copy and then uploads; it downloads a file or a
directory once, and all processes of the node read it there.

A store has no rename. A file appears there when its upload ends. A directory takes many uploads, so it counts as
complete exactly if it holds `.done`, which is deleted first and uploaded last:

    upload of sft/:      delete sft/.done, delete sft/*, upload sft/*, upload sft/.done
    another node reads:  complete          not complete ............. complete, with a new id in .done

`.done` holds a random id, new for each upload, by which a node sees that its copy is old.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import logging
import shutil
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pyarrow import ArrowException
from pyarrow.fs import FileSelector, FileSystem, FileType, LocalFileSystem, copy_files

from rayrlhf.errors import UserError
from rayrlhf.runs.addresses import is_uri, join, local_path, refuse_secrets

log = logging.getLogger(__name__)

MARK = ".done"
CHUNK_BYTES = 64 * 2**20
"""A chunk is a request: pyarrow's 1 MiB would make thousands of them for a model."""
SYNC_S = 5.0
"""How often files that grow are uploaded."""


def local_copy(address: str) -> str:
    """A path at which this process can open what is at `address`.

    A file or directory of a store is downloaded, unless the node has its newest version. Anything else, such as a path
    or a model's name on the hub, comes back as it is.

    Raises:
        FileNotFoundError: the store has no such file, and no such directory that is complete.
    """
    if not is_uri(address):
        return address
    store, path = locate(address)
    return str(store.download(path))


def locate(address: str) -> tuple[Store, Path]:
    """The store of the folder that a file or directory is in, and the path of its copy.

    Raises:
        UserError: as `Store.open`.
    """
    base, mark, options = address.partition("?")
    folder, _, name = base.rstrip("/").rpartition("/")
    store = Store.open(folder + mark + options)
    return store, store.copy / name


@dataclass(frozen=True)
class Store:
    """One folder of a store and this node's copy of it. Paths are those of the copy."""

    address: str
    filesystem: FileSystem
    root: str
    """The folder's path within the filesystem."""
    copy: Path

    @classmethod
    @functools.lru_cache
    def open(cls, uri: str) -> Store:
        """The folder at a URI; the same object each time.

        Raises:
            UserError: pyarrow has no filesystem for it, the filesystem does not answer, or the URI holds a password.
        """
        refuse_secrets(uri)
        with as_user_error(uri):
            filesystem, root = FileSystem.from_uri(uri)
        return cls(uri, filesystem, root.rstrip("/"), local_path(uri))

    def remote(self, path: Path) -> str:
        """Where the filesystem has what `path` is the copy of."""
        return f"{self.root}/{path.relative_to(self.copy).as_posix()}"

    def upload(self, path: Path) -> None:
        """Make the store's version of a file or directory that of the copy; delete it there if the copy has none."""
        target = self.remote(path)
        if path.is_dir():
            self.delete(f"{target}/{MARK}")
            if self.filesystem.get_file_info(target).type == FileType.Directory:
                self.filesystem.delete_dir(target)
            self.filesystem.create_dir(target, recursive=True)
            (path / MARK).unlink(missing_ok=True)  # and not overwritten: it may be a hard link to another run's
            self._copy(str(path), target, LocalFileSystem(), self.filesystem)
            (path / MARK).write_text(uuid.uuid4().hex, encoding="utf-8")
            self.write(f"{target}/{MARK}", (path / MARK).read_bytes())
        elif path.exists():
            self.filesystem.create_dir(target.rpartition("/")[0], recursive=True)
            self._copy(str(path), target, LocalFileSystem(), self.filesystem)
        else:
            self.delete(target)

    def exists(self, path: Path) -> bool:
        """Whether the store has this file, or this directory complete."""
        source = self.remote(path)
        paths = [source, f"{source}/{MARK}"]
        return any(info.type == FileType.File for info in self.filesystem.get_file_info(paths))

    def directories_in(self, path: Path) -> list[str]:
        """Names of the complete directories inside a directory; none if the store has no such directory."""
        selector = FileSelector(self.remote(path), allow_not_found=True)
        found = [i.base_name for i in self.filesystem.get_file_info(selector) if i.type == FileType.Directory]
        return [name for name in found if self.exists(path / name)]

    def remove(self, path: Path) -> None:
        """Delete a directory of the store. Its mark goes first, so that half of one does not look complete."""
        self.delete(f"{self.remote(path)}/{MARK}")
        if self.filesystem.get_file_info(self.remote(path)).type == FileType.Directory:
            self.filesystem.delete_dir(self.remote(path))

    def download(self, path: Path) -> Path:
        """Make the copy of a file or directory the store's version; returns `path`.

        A directory whose copy has the store's `.done` is left alone. Processes of one node download one after the
        other, so that the second finds what the first has downloaded.

        Raises:
            FileNotFoundError: the store has no such file, and no such directory that is complete.
        """
        source = self.remote(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(path.parent / f".{path.name}.lock"):
            mark = self.read(f"{source}/{MARK}")
            if mark is None and self.filesystem.get_file_info(source).type != FileType.File:
                raise FileNotFoundError(f"{join(self.address, path.name)} is missing, or not complete")
            if mark is not None and path.is_dir() and (path / MARK).is_file() and (path / MARK).read_bytes() == mark:
                return path
            partial = path.parent / f".{path.name}.download"
            _remove(partial)  # left by a process that was killed
            if mark is not None:
                partial.mkdir()
            self._copy(source, str(partial), self.filesystem, LocalFileSystem())
            if path.is_dir():
                _remove(path)  # a directory cannot be renamed over one with contents
            partial.rename(path)
        return path

    def pull_files(self) -> None:
        """Make the files directly in the copy those of the store: download, and delete what the store lacks.

        Directories, which are large, wait until `download` asks for them. A file that this process mirrors stays as it
        is: the process is writing it, and the store is behind.
        """
        self.copy.mkdir(parents=True, exist_ok=True)
        growing = {path for mirror in _mirrors for path in mirror.paths()}
        found = self.filesystem.get_file_info(FileSelector(self.root, allow_not_found=True))
        names = {info.base_name for info in found if info.type == FileType.File and not info.base_name.startswith(".")}
        for path in self.copy.iterdir():
            if path.is_file() and not path.name.startswith(".") and path.name not in names and path not in growing:
                path.unlink()
        for path in sorted({self.copy / name for name in names} - growing):
            self.download(path)

    def folders_with(self, name: str) -> list[str] | None:
        """The folders directly in this one that hold a file `name`, sorted; None if this one is not there."""
        if self.filesystem.get_file_info(self.root).type != FileType.Directory:
            return None
        found = self.filesystem.get_file_info(FileSelector(self.root))
        folders = sorted(info.base_name for info in found if info.type == FileType.Directory)
        files = self.filesystem.get_file_info([f"{self.root}/{folder}/{name}" for folder in folders])
        return [folder for folder, info in zip(folders, files, strict=True) if info.type == FileType.File]

    def read(self, remote: str, offset: int = 0) -> bytes | None:
        """The bytes of a file from `offset` on; None if there is no such file."""
        info = self.filesystem.get_file_info(remote)
        if info.type != FileType.File:
            return None
        if info.size <= offset:
            return b""
        with self.filesystem.open_input_file(remote) as file:
            file.seek(offset)
            return bytes(file.read())

    def read_from(self, name: str, offset: int) -> bytes:
        """The bytes of a file directly in the folder from `offset` on; none if there is no such file."""
        return self.read(f"{self.root}/{name}", offset) or b""

    def write(self, remote: str, content: bytes) -> None:
        """Write a small file."""
        with self.filesystem.open_output_stream(remote) as file:
            file.write(content)

    def delete(self, remote: str) -> None:
        """Delete a file, if it is there."""
        if self.filesystem.get_file_info(remote).type == FileType.File:
            self.filesystem.delete_file(remote)

    def _copy(self, source: str, target: str, source_system: FileSystem, target_system: FileSystem) -> None:
        # Threads that copy can wait for one another for ever on S3 (apache/arrow#32372).
        copy_files(source, target, source_filesystem=source_system, destination_filesystem=target_system,
                   use_threads=False, chunk_size=CHUNK_BYTES)  # fmt: skip


_mirrors: set[Mirror] = set()
"""The mirrors of this process that are not closed."""


def sync_mirrors() -> None:
    """Upload now what has changed in the files that this process mirrors.

    Ray Train's loops call it before a checkpoint, so that a restart from there finds the metrics of all its steps.
    """
    for mirror in tuple(_mirrors):
        mirror.sync()


class Mirror:
    """Uploads files that grow, from the copy into the store. For a run in a directory it does nothing.

    A store has no append: every `SYNC_S` a file that has changed is uploaded whole.
    """

    def __init__(self, address: str | Path, patterns: list[str]) -> None:
        """Mirror the files of the folder at `address` that match one of the patterns (see `Path.glob`)."""
        self._store = Store.open(str(address)) if is_uri(address) else None
        self._patterns = patterns
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._uploaded = self._same_in_store()
        if self._store:
            _mirrors.add(self)
            self._thread = threading.Thread(target=self._poll, daemon=True)
            self._thread.start()

    def sync(self) -> None:
        """Upload now what has changed."""
        if self._store:
            with self._lock:
                state = self._state()
                for path in [path for path in state if state[path] != self._uploaded.get(path)]:
                    self._store.upload(path)
                self._uploaded = state

    def close(self) -> None:
        """Upload what has changed, and stop."""
        self._ended.set()
        _mirrors.discard(self)
        if self._store:
            self._thread.join()
        self.sync()

    def paths(self) -> list[Path]:
        """The files that are mirrored, in the copy; none for a directory."""
        if self._store is None:
            return []
        return [path for pattern in self._patterns for path in self._store.copy.glob(pattern) if path.is_file()]

    def _state(self) -> dict[Path, tuple[int, int]]:
        return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in self.paths()}

    def _same_in_store(self) -> dict[Path, tuple[int, int]]:
        """The state of the files that the store has in the same size: an earlier process has uploaded these."""
        state = self._state()
        if self._store is None or not state:
            return {}
        found = self._store.filesystem.get_file_info([self._store.remote(path) for path in state])
        sizes = [info.size if info.type == FileType.File else None for info in found]
        return {path: state[path] for path, size in zip(state, sizes, strict=True) if state[path][0] == size}

    def _poll(self) -> None:
        while not self._ended.wait(SYNC_S):
            try:
                self.sync()
            except OSError as error:
                log.warning("not uploaded, tried again in %.0f s: %s", SYNC_S, error)


@contextlib.contextmanager
def as_user_error(address: str) -> Iterator[None]:
    """Turn an error of the filesystem within the block into a `UserError` of one line, with what to check."""
    try:
        yield
    except (OSError, ArrowException) as error:
        reason = (str(error).split(" (Request ID")[0].splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{address}: {reason}; check the URI, that its bucket exists, and the keys (for S3: AWS_ACCESS_KEY_ID, "
            "AWS_SECRET_ACCESS_KEY) in the environment"
        ) from None


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Wait until no other process of this node is in a block with the same lock file."""
    with path.open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
