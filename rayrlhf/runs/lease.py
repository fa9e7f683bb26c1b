"""The lock of a run in a store: an object, the lease, that its holder writes anew every few seconds.

Every write names the version that it replaces, and the store refuses it if somebody else has written meanwhile
(`rayrlhf.runs.conditional`). So of two processes one holds the run, however their requests interleave.

- A process that finds no lease, or an empty one, writes its own.
- A process that finds a lease watches it for as long as the lease itself says, which is `PATIENCE_S` of its holder. If
  it changes, the holder is alive, and the process gives up. If it does not, the process replaces it.
- The lease of a process of this machine that has ended is replaced at once.
- A holder whose renewal is refused stops at once. At its end it empties the lease.

Clocks of different machines are never compared.

Two processes, A and B, start at the same moment (seconds on the left):

    0.0  A reads: no lease.   B reads: no lease.
    0.1  A writes, if there is none: holds the run, and renews the lease every 10 s.
    0.2                       B writes, if there is none: refused. It gives up.

A holds the run and is cut off from the store, and B and C wait for it:

    0    A's last renewal, version 7.
    3    B and C find version 7 and watch it.
    38   Still version 7. B replaces version 7, and holds the run. C replaces version 7: refused. It gives up.
    60   A reaches the store again and replaces version 7: refused. It stops without writing.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from rayrlhf.errors import UserError
from rayrlhf.runs.conditional import ChangedError, ConditionalObject, Version
from rayrlhf.runs.storage import Store, as_user_error
from rayrlhf.terminal import say

log = logging.getLogger(__name__)

NAME = ".lock"
LOST = signal.SIGUSR2
"""Wakes the main thread of a process whose folder another one has taken over. At SIGINT it would write a checkpoint."""
RENEW_S = 10.0
"""Seconds between two renewals."""
PATIENCE_S = 35.0
"""Seconds without a renewal after which this process, as a holder, counts as dead: three renewals may fail."""
_WATCH_S = 1.0


@contextlib.contextmanager
def leased(store: Store) -> Iterator[None]:
    """Hold the store's folder for writing.

    When another process takes the folder over, the block is interrupted by a KeyboardInterrupt.

    Raises:
        UserError: the store does not answer, it refuses to be written, or another process holds the folder.
    """
    holder, token = f"process {os.getpid()} on {socket.gethostname()}", uuid.uuid4().hex
    ended = threading.Event()

    def content(count: int) -> str:
        return f"{holder}\n{token}\n{count}\n{_machine()}\n{PATIENCE_S}"

    def write(text: str, before: Version | None) -> Version:
        try:
            return lease.write(text, before)
        except ChangedError:
            # A write whose answer was lost is tried again, and then refused for the sake of the first one.
            found = lease.read()
            if found is None or token not in found.content:
                raise
            return found if found.content == text else lease.write(text, found)

    with as_user_error(store.address):
        store.filesystem.create_dir(store.root, recursive=True)
        lease = ConditionalObject(store, NAME)
        free = _free_version(store, lease)
        try:
            held = write(content(0), free)
        except ChangedError:
            raise _held(store, lease.read()) from None
        _require_conditions(store, lease, held)

    def renew() -> None:
        nonlocal held
        count = 0
        while not ended.wait(RENEW_S):
            count += 1
            try:
                held = write(content(count), held)
            except ChangedError:
                log.error("%s: another process has taken it over; this one ends", store.address)
                # A signal and no flag: it also wakes a main thread that waits for Ray.
                signal.pthread_kill(threading.main_thread().ident or 0, LOST)
                return
            except OSError as error:
                log.warning("%s: lease not renewed, tried again in %.0f s: %s", store.address, RENEW_S, error)

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        with _interruptible():
            yield
    finally:
        ended.set()
        thread.join()
        try:
            # Emptied, not deleted: no store deletes on a condition, and by now the lease may be another's.
            write("", held)
        except ChangedError:
            pass
        except OSError as error:  # only logged, so that it does not hide the error that may have ended the block
            log.warning("%s: lease not given back, others wait %.0f s for it: %s", store.address, PATIENCE_S, error)


def lease_holder(store: Store) -> str | None:
    """The process that wrote the lease, in words; None without a lease, or if that process of this machine is gone."""
    lease = (store.read(f"{store.root}/{NAME}") or b"").decode()
    return None if _is_free(lease) else _holder(lease)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """During the block, the signal `LOST` raises KeyboardInterrupt in the main thread.

    In a block of another thread, such as a sweep's trial, the signal ends the process, which is what it does by itself.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(LOST, interrupt)
    try:
        yield
    finally:
        signal.signal(LOST, before)


def _free_version(store: Store, lease: ConditionalObject) -> Version | None:
    """The version that may be replaced, once its holder is known to be gone; None if there is no lease.

    Raises:
        UserError: the holder lives.
    """
    first = lease.read()
    if first is None or _is_free(first.content):
        return first
    say(f"{store.address} is locked by {_holder(first.content)}; waiting to see whether that still runs")
    deadline = time.monotonic() + _patience(first.content)
    while time.monotonic() < deadline:
        time.sleep(_WATCH_S)
        now = lease.read()
        if now is None or _is_free(now.content):
            return now
        if now != first:
            raise _held(store, now)
    return first


def _require_conditions(store: Store, lease: ConditionalObject, held: Version) -> None:
    """
    Raises:
        UserError: the server writes though its condition does not hold, as some that speak S3's protocol do.
    """
    with contextlib.suppress(ChangedError):
        lease.write(held.content, None)
        raise UserError(
            f"{store.address}: the server ignores If-None-Match, without which two processes could write into one run; "
            "use a newer version of it, another store, or a directory"
        )


def _machine() -> str:
    """An id of the space in which process ids are unique: one boot of one machine, one namespace of processes.

    A host name would not do: containers and cloned machines share them.
    """
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux
        return socket.gethostname()


def _holder(lease: str) -> str:
    return lease.partition("\n")[0]


def _patience(lease: str) -> float:
    """Seconds without a change after which the holder counts as dead, as it has said itself."""
    lines = lease.splitlines()
    return float(lines[4]) if len(lines) == 5 else PATIENCE_S


def _is_free(lease: str) -> bool:
    """Whether nobody will renew the lease: it is empty, or of a process of this machine that has ended."""
    lines = lease.splitlines()
    if not lines:
        return True
    if len(lines) < 4 or lines[3] != _machine():
        return False
    try:
        os.kill(int(lines[0].split()[1]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass  # it runs, as another user
    return False


def _held(store: Store, lease: Version | None) -> UserError:
    holder = _holder(lease.content) if lease and lease.content else "another process"
    return UserError(f"{store.address} is being written by {holder}; wait for it, end it, or choose another name")
