"""The lock of a run in a store: an object, the lease, that its holder writes anew every few seconds.

Object stores have no locks, and pyarrow has no conditional write. So processes watch the lease:

- A process that finds a lease waits `PATIENCE_S`. If the lease changes, its holder is alive, and the process gives up.
  If it does not, the process takes it over. The lease of a process of this machine that has ended is taken at once.
- A process that has written a lease waits `SETTLE_S` and reads it back, in case another one wrote at the same moment.
- A holder that finds another token in the lease stops at once.

Clocks of different machines are never compared.

Two processes, A and B, start at the same moment (seconds on the left):

    0.0  A reads: no lease.   B reads: no lease.
    0.1  A writes token a.
    0.2                       B writes token b, over A's.
    1.1  A reads b: gives up.
    1.2                       B reads b: holds the run, renews the lease every 10 s.

A holds the run and is cut off from the store:

    0    A's last renewal.
    3                         B finds A's lease and watches it.
    38                        The lease has not changed: B writes token b and holds the run.
    60   A reaches the store again, reads b, and stops without writing.
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
from rayrlhf.runs.storage import Store, as_user_error

log = logging.getLogger(__name__)

NAME = ".lock"
LOST = signal.SIGUSR2
"""Wakes the main thread of a process whose folder another one has taken over. At SIGINT it would write a checkpoint."""
RENEW_S = 10.0
"""Seconds between two renewals."""
PATIENCE_S = 35.0
"""Seconds without a renewal after which a holder counts as dead: three renewals may fail."""
SETTLE_S = 1.0
"""Seconds in which two processes that started together have both written."""


@contextlib.contextmanager
def leased(store: Store) -> Iterator[None]:
    """Hold the store's folder for writing.

    When another process takes the folder over, the block is interrupted by a KeyboardInterrupt.

    Raises:
        UserError: the store does not answer, it refuses to be written, or another process holds the folder.
    """
    remote, holder = f"{store.root}/{NAME}", f"process {os.getpid()} on {socket.gethostname()}"
    token, ended = uuid.uuid4().hex, threading.Event()

    def write(count: int) -> None:
        store.write(remote, f"{holder}\n{token}\n{count}\n{_machine()}".encode())

    def taken_over() -> bool:
        found = store.read(remote)
        return found is not None and token not in found.decode()

    def renew() -> None:
        count = 0
        while not ended.wait(RENEW_S):
            count += 1
            try:
                if taken_over():
                    log.error("%s: another process has taken it over; this one ends", store.address)
                    # A signal and no flag: it also wakes a main thread that waits for Ray.
                    signal.pthread_kill(threading.main_thread().ident or 0, LOST)
                    return
                write(count)
            except OSError as error:
                log.warning("%s: not renewed, tried again in %.0f s: %s", remote, RENEW_S, error)

    with as_user_error(store.address):
        store.filesystem.create_dir(store.root, recursive=True)
        _wait_until_free(store, remote)
        write(0)
        time.sleep(SETTLE_S)
        found = store.read(remote)
    if found is None or token not in found.decode():
        raise _held(store, found or b"another process")
    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        with _interruptible():
            yield
    finally:
        ended.set()
        thread.join()
        try:
            if not taken_over():
                store.delete(remote)
        except OSError as error:  # only logged, so that it does not hide the error that may have ended the block
            log.warning("%s: not removed, others will wait %.0f s for it: %s", remote, PATIENCE_S, error)


def lease_holder(store: Store) -> str | None:
    """The process that wrote the lease, in words; None without a lease, or if that process of this machine is gone."""
    lease = store.read(f"{store.root}/{NAME}")
    return None if lease is None or _ended_here(lease) else _holder(lease)


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


def _wait_until_free(store: Store, remote: str) -> None:
    first = store.read(remote)
    if first is None or _ended_here(first):
        return
    print(f"{store.address} is locked by {_holder(first)}; waiting to see whether that still runs", flush=True)
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        time.sleep(1.0)
        now = store.read(remote)
        if now is None:
            return
        if now != first:
            raise _held(store, now)


def _machine() -> str:
    """An id of the space in which process ids are unique: one boot of one machine, one namespace of processes.

    A host name would not do: containers and cloned machines share them.
    """
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux
        return socket.gethostname()


def _holder(lease: bytes) -> str:
    return lease.decode().partition("\n")[0]


def _ended_here(lease: bytes) -> bool:
    """Whether the lease is that of a process of this machine that has ended, so that nobody will renew it."""
    lines = lease.decode().splitlines()
    if len(lines) != 4 or lines[3] != _machine():
        return False
    try:
        os.kill(int(lines[0].split()[1]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass  # it runs, as another user
    return False


def _held(store: Store, lease: bytes) -> UserError:
    return UserError(
        f"{store.address} is being written by {_holder(lease)}; wait for it, end it, or choose another name"
    )
