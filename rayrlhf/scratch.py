"""A directory for the temporary files of one command. If the command is killed, the next one removes it.

Libraries leave sockets and files in the directory for temporary files when their process is killed, and some at every
end: Ray's dashboard, vLLM's and torch's meeting places. Here they have a place that belongs to one command:

    /tmp/rlhf-1000/k3j9x2        the directory, TMPDIR of the command and of all that it starts
    /tmp/rlhf-1000/k3j9x2.lock   locked (flock) by the command for as long as it lives

The kernel gives up the lock of a process that has ended, however it ended, and of no other. So whoever gets a lock
knows that its command is gone, whatever its number is now; and a command that only stands still keeps its directory.
"""

from __future__ import annotations

import contextlib
import fcntl
import getpass
import multiprocessing
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rayrlhf.errors import UserError
from rayrlhf.files import CACHE, cache_directory

LOCK = ".lock"
_LONGEST = 64
"""Characters of a directory: those of a Unix socket in it are 107 at most, and libraries add up to 37."""


@contextlib.contextmanager
def scratch() -> Iterator[None]:
    """In the block, this process and all that it starts keep temporary files in a directory that goes with the block.

    What is to stay stays where it was: Ray's sessions with their logs, the cache, and what torch has compiled. Without
    room for a directory, and with a TMPDIR too long for one, nothing changes.

    Raises:
        UserError: somebody else has put something in its place.
    """
    outer = Path(tempfile.gettempdir())
    parent = outer / f"rlhf-{os.getuid()}"
    variables = {
        "RAY_TMPDIR": os.environ.get("TMPDIR", "/tmp"),  # as Ray has it
        "TORCHINDUCTOR_CACHE_DIR": str(outer / f"torchinductor_{_user()}"),
        CACHE: str(cache_directory()),
    }
    claimed = None
    with contextlib.suppress(OSError):  # a full disk, say: commands that need none go on
        _make_private(parent)
        sweep(parent)
        claimed = _claim(parent)
    if claimed is None:
        yield
        return
    directory, lock = claimed
    before = dict(os.environ), tempfile.tempdir
    os.environ.update({"TMPDIR": str(directory), **variables, **{k: v for k, v in before[0].items() if k in variables}})
    tempfile.tempdir = str(directory)
    try:
        yield
    finally:
        tempfile.tempdir = before[1]
        for key in ("TMPDIR", *variables):
            os.environ.pop(key, None)
            if key in before[0]:
                os.environ[key] = before[0][key]
        _remove(directory, lock)


@contextlib.contextmanager
def nameless_semaphores() -> Iterator[None]:
    """In the block, multiprocessing takes the name from a semaphore when it has made it.

    A name in /dev/shm outlives a process that is killed. Only where processes are forked does multiprocessing need
    none; some packages have them spawned, in every process that imports them. The block may start no process that
    waits for one of these semaphores.
    """
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("fork", force=True)
    try:
        yield
    finally:
        multiprocessing.set_start_method(before, force=True)


def _user() -> str:
    """As torch has it in the name of its cache."""
    try:
        name = getpass.getuser()
    except (KeyError, OSError):  # in a container, where nobody has this number
        name = f"uid_{os.getuid()}"
    return re.sub(r'[\\/:*?"<>|]', "_", name)


def sweep(parent: Path) -> list[Path]:
    """Remove the directories of commands that are gone; returns them."""
    gone = []
    for file in sorted(parent.glob(f"*{LOCK}")):
        lock = _locked(file)
        if lock is not None:
            gone.append(file.with_suffix(""))
            _remove(gone[-1], lock)
    return gone


def _make_private(parent: Path) -> None:
    with contextlib.suppress(FileExistsError):
        parent.mkdir(mode=0o700)
    found = parent.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise UserError(f"{parent} is no directory of yours alone; remove it, or set TMPDIR to a directory of yours")


def _claim(parent: Path) -> tuple[Path, int] | None:
    """A new directory and its lock; None if paths in it would be too long."""
    while len(str(directory := parent / secrets.token_hex(3))) <= _LONGEST:
        with contextlib.suppress(FileExistsError):
            os.close(os.open(directory.with_suffix(LOCK), os.O_CREAT | os.O_EXCL, 0o600))
            # Another command may have taken it for one that was left, and removed it.
            if (lock := _locked(directory.with_suffix(LOCK))) is not None:
                directory.mkdir(mode=0o700)
                return directory, lock
    return None


def _locked(file: Path) -> int | None:
    """The lock of a file as a descriptor; None if a command holds it, or the file is not there any more."""
    try:
        lock = os.open(file, os.O_RDWR | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(lock).st_nlink:
            return lock
    except BlockingIOError:
        pass
    os.close(lock)
    return None


def _remove(directory: Path, lock: int) -> None:
    """Remove a directory and its lock, which this process holds; what somebody still writes there, the next command."""
    shutil.rmtree(directory, ignore_errors=True)
    if not directory.exists():
        directory.with_suffix(LOCK).unlink(missing_ok=True)
    os.close(lock)
