"""SIGTERM: asked once, and ended by a second one."""

from __future__ import annotations

import os
import signal
import threading
from types import SimpleNamespace

import pytest

from jobs import stopping


def test_signals_of_one_moment_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    now, asked = [100.0], threading.Event()
    monkeypatch.setattr(stopping, "time", SimpleNamespace(monotonic=lambda: now[0]))
    with pytest.raises(KeyboardInterrupt), stopping.asking_first(asked.set) as event:
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked.wait(10) and event.is_set()
        now[0] += 1.0
        os.kill(os.getpid(), signal.SIGTERM)  # passed on by `uv run`, say
        now[0] += 10.0
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("went on")
