"""SIGTERM, which `ray job stop` sends before it kills: what can be kept is kept.

PPO is asked for a checkpoint at the end of the step that it is in. Everything else ends as by Ctrl-C; so does PPO at
a second SIGTERM some seconds later. The same command continues.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SAME_SIGNAL_S = 5.0
"""Signals that come within this time are one: `uv run` and a shell pass on what Ray has sent to their child as well."""


@contextmanager
def interrupted_by_sigterm() -> Iterator[None]:
    """During the block, SIGTERM is a KeyboardInterrupt."""
    with _on_sigterm(_interrupt):
        yield


@contextmanager
def asking_first(ask: Callable[[], object]) -> Iterator[threading.Event]:
    """During the block, the first SIGTERM calls `ask`, from another thread; the event says that it came."""
    asked, first = threading.Event(), 0.0

    def handle(number: int, frame: Any) -> None:
        nonlocal first
        if asked.is_set():
            if time.monotonic() - first > SAME_SIGNAL_S:
                _interrupt(number, frame)
            return
        first = time.monotonic()
        asked.set()
        print("stopping: PPO writes a checkpoint when its step ends; SIGTERM again ends it now", flush=True)
        # Not here: the signal may have come in the middle of a call to Ray.
        threading.Thread(target=ask, name="stopping", daemon=True).start()

    with _on_sigterm(handle):
        yield asked


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


@contextmanager
def _on_sigterm(handler: Callable[[int, Any], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # a sweep's trial: Python allows handlers there only
        yield
        return
    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
