"""What a command does at Ctrl-C, and at SIGTERM, which `ray job stop` sends before it kills the process.

A training stage finishes its step, writes a checkpoint and ends. A stage that samples keeps what it has and ends.
Anything else ends at once, and so does a stage at a second signal. The same command continues the run in each case.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rayrlhf.terminal import say

SAME_SIGNAL_S = {signal.SIGINT: 1.0, signal.SIGTERM: 5.0}
"""Signals within this time of the first count as one: Ray or the terminal signals the child directly, and `uv run` or a
shell passes it on again."""


@contextmanager
def interrupted_by_sigterm() -> Iterator[None]:
    """During the block, SIGTERM is a KeyboardInterrupt."""
    with _on([signal.SIGTERM], _interrupt):
        yield


@contextmanager
def asking_first(
    stage: str, ask: Callable[[], object], does: str = "writes a checkpoint when its step ends"
) -> Iterator[threading.Event]:
    """During the block, the first Ctrl-C or SIGTERM calls `ask` in another thread and sets the event that it gets.

    A second one is a KeyboardInterrupt.

    Args:
        stage: its name, for the message.
        ask: has the stage save and end.
        does: what the stage does before it ends, for the message.
    """
    asked, first = threading.Event(), 0.0

    def handle(number: int, frame: Any) -> None:
        nonlocal first
        if asked.is_set():
            if time.monotonic() - first > SAME_SIGNAL_S[signal.Signals(number)]:
                _interrupt(number, frame)
            return
        first = time.monotonic()
        asked.set()
        word = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
        say(f"stopping: {stage} {does}; {word} again ends it now")
        # In a thread: this handler may have interrupted a call to Ray, and Ray is not made to be entered again there.
        threading.Thread(target=ask, name="stopping", daemon=True).start()

    with _on([signal.SIGTERM, signal.SIGINT], handle):
        yield asked


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


@contextmanager
def _on(numbers: Sequence[signal.Signals], handler: Callable[[int, Any], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # a sweep's trial: Python allows handlers there only
        yield
        return
    # A shell ignores SIGINT for what a script starts in the background (`command &`), and that is to stay so.
    numbers = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
