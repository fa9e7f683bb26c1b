"""The lock of a run in a store: an object that its holder writes anew every few seconds.

Stores have no locks, and pyarrow has no conditional write. So one who finds a lease watches it: if it changes, its
holder lives; if it does not, it may be taken. Who has written a lease reads it again a moment later, to see whether
another wrote one at the same time. Who renews a lease that has become another's, since the store could not be reached
for a while, ends. No clocks are compared.
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
RENEW_S, PATIENCE_S, SETTLE_S = 10.0, 35.0, 1.0


@contextlib.contextmanager
def leased(store: Store) -> Iterator[None]:
    """Hold the store's folder for writing. The block is interrupted (KeyboardInterrupt) when another has taken it over.

    Raises:
        UserError: the store does not answer or refuses to be written, or another process holds it.
    """
    remote, holder = f"{store.root}/{NAME}", f"process {os.getpid()} on {socket.gethostname()}"
    token, ended, lost = uuid.uuid4().hex, threading.Event(), threading.Event()

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
                    lost.set()
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)  # wakes it, too
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
        with _interruptible(lost):
            yield
    finally:
        ended.set()
        thread.join()
        try:
            if not taken_over():
                store.delete(remote)
        except OSError as error:  # what ends the block matters more
            log.warning("%s: not removed, others will wait %.0f s for it: %s", remote, PATIENCE_S, error)


def lease_holder(store: Store) -> str | None:
    """Who has written the lease, in words; None if nobody has, or a process of this machine that is gone."""
    lease = store.read(f"{store.root}/{NAME}")
    return None if lease is None or _ended_here(lease) else _holder(lease)


@contextlib.contextmanager
def _interruptible(lost: threading.Event) -> Iterator[None]:
    """Once `lost` is set, SIGINT is a KeyboardInterrupt also where it is ignored, as in a script's `command &`."""
    if (
        signal.getsignal(signal.SIGINT) is not signal.SIG_IGN
        or threading.current_thread() is not threading.main_thread()
    ):
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        if lost.is_set():
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


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
    """Where process ids mean the same: host names are alike in containers and on machines that were cloned."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux
        return socket.gethostname()


def _holder(lease: bytes) -> str:
    return lease.decode().partition("\n")[0]


def _ended_here(lease: bytes) -> bool:
    """Whether the holder was a process of this machine that is gone."""
    lines = lease.decode().splitlines()
    if len(lines) != 4 or lines[3] != _machine():
        return False
    try:
        os.kill(int(lines[0].split()[1]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


def _held(store: Store, lease: bytes) -> UserError:
    return UserError(
        f"{store.address} is being written by {_holder(lease)}; wait for it, end it, or choose another name"
    )
