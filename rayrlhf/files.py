"""Writing files and directories so that others see them whole or not at all, and knowing a file's content again."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CACHE = "RAYRLHF_CACHE"
"""Environment variable: where a node keeps copies and tokenised data.

Default: rayrlhf in XDG_CACHE_HOME or ~/.cache; without a home, a directory for temporary files."""
_DIGEST_BYTES = 16


def cache_directory() -> Path:
    """Where this node keeps what can be made again."""
    if given := os.environ.get(CACHE):
        return Path(given).absolute()
    try:
        return (Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "rayrlhf").absolute()
    except RuntimeError:  # a user without a home, as there is in some containers
        return Path(tempfile.gettempdir()) / f"rayrlhf-{os.getuid()}"


@contextlib.contextmanager
def replacing(target: Path, directory: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `target`, which takes the place of `target` when the block ends without an error.

    What the block has written is then as readable as the umask allows.

    What a killed process left behind is removed first. So there must be one writer at a time, see `RunFolder.lock`.
    """
    _remove_stale(target)
    temporary = target.parent / f".{target.name}.tmp-{os.getpid()}"
    target.parent.mkdir(parents=True, exist_ok=True)
    if directory:
        temporary.mkdir()
    try:
        yield temporary
        if directory:
            _share(temporary)
        if target.is_dir():
            # A directory cannot be renamed over one with contents: for a moment there is none, which reads as not done.
            target.rename(target.parent / f".{target.name}.old-{os.getpid()}")
        temporary.rename(target)
    finally:
        _remove_stale(target)


def make_private(path: Path) -> None:
    """Make an empty file that only its owner may read, where there is none."""
    if not path.exists():
        path.touch(mode=0o600)


def sync(path: Path) -> None:
    """Have the disk hold a file's content, or the names in a directory, before this returns."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(path: Path) -> None:
    """Have the disk hold a file, or every file below a directory and their names, before this returns."""
    for each in [*path.rglob("*"), path]:
        sync(each)


def fingerprint(path: Path) -> dict[str, Any]:
    """The size and hash of a file's content."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=_DIGEST_BYTES))
    return {"bytes": path.stat().st_size, "blake2b": digest.hexdigest()}


def fingerprints(directory: Path) -> dict[str, Any]:
    """The fingerprint of every file below a directory by its name there, without hidden ones, as a store's mark is."""
    files = sorted(file for file in directory.rglob("*") if file.is_file() and not file.name.startswith("."))
    return {file.relative_to(directory).as_posix(): fingerprint(file) for file in files}


def difference(directory: Path, expected: dict[str, Any]) -> str | None:
    """How files below a directory differ from what `fingerprints` returned, in words; None if they do not."""
    for name, before in expected.items():
        if not (directory / name).is_file():
            return f"{name} is missing"
        if fingerprint(directory / name) != before:
            return f"{name} is not what was written"
    return None


def _share(directory: Path) -> None:
    """Let the files of a new directory be read by those whom the umask allows it.

    safetensors, for one, writes through temporary files, which only their owner may read.
    """
    allowed = directory.stat().st_mode & 0o666  # the umask is applied to a new directory
    for path in directory.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(stat.S_IMODE(path.stat().st_mode) | allowed)


def _remove_stale(target: Path) -> None:
    for kind in ("tmp", "old"):
        for stale in target.parent.glob(f".{target.name}.{kind}-*"):
            if stale.is_dir():
                shutil.rmtree(stale)
            else:
                stale.unlink()
