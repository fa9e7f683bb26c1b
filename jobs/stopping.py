"""What a stage does at SIGTERM, which `ray job stop` sends before it kills the process.

`rl` finishes its step, writes a checkpoint and ends. Other stages end at once, as at Ctrl-C; so does `rl` at a
second SIGTERM that comes more than `SAME_SIGNAL_S` later. The same command continues the run in each case.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SAME_SIGNAL_S = 5.0
"""Signals within this time count as one: Ray signals the child directly, and `uv run` or a shell passes it on again."""


@contextmanager
def interrupted_by_sigterm() -> Iterator[None]:
    """During the block, SIGTERM is a KeyboardInterrupt."""
    with _on_sigterm(_interrupt):
        yield


@contextmanager
def asking_first(ask: Callable[[], object]) -> Iterator[threading.Event]:
    """During the block, the first SIGTERM calls `ask` in another thread and sets the event that the block gets."""
    asked, first = threading.Event(), 0.0

    def handle(number: int, frame: Any) -> None:
        nonlocal first
        if asked.is_set():
            if time.monotonic() - first > SAME_SIGNAL_S:
                _interrupt(number, frame)
            return
        first = time.monotonic()
        asked.set()
        print("stopping: rl writes a checkpoint when its step ends; SIGTERM again ends it now", flush=True)
        # In a thread: this handler may have interrupted a call to Ray, and Ray is not made to be entered again there.
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
