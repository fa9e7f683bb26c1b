"""What the coordinator's process warns of reaches the driver, once and whole."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from types import SimpleNamespace

import pytest

from actors.pools.announcing import WHOLE, Announcement, Announcements
from actors.pools.remote import Remote
from jobs.listener import Listener


def test_the_driver_hears_each_warning_of_the_coordinators_process_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those of another process in its place, which has said less."""
    kept = [Announcements()]
    try:

        class Coordinator:
            def announcements(self, process: str, heard: int) -> tuple[str, Sequence[Announcement]]:
                return kept[-1].since(process, heard)

        monkeypatch.setattr("jobs.listener.ray", SimpleNamespace(is_initialized=lambda: True))
        monkeypatch.setattr("jobs.listener._ASK_S", 0.001)
        heard: list[tuple[str, str]] = []
        listener = Listener(
            Remote("coordinator", Coordinator(), local=True), lambda line, whole: heard.append((line, whole))
        )
        log = logging.getLogger("actors.pools.pool")
        log.warning("%s died", "generator-0", extra={WHOLE: "its stacks"})
        while not heard:
            time.sleep(0.01)
        log.warning("generator-1 died")
        log.info("no warning")
        while len(heard) < 2:
            time.sleep(0.01)
        kept.append(Announcements())
        log.warning("coordinator died")
        listener.close()
        assert [line for line, _ in heard] == ["generator-0 died", "generator-1 died", "coordinator died"]
        assert heard[0] == ("generator-0 died", "its stacks")
    finally:
        for each in kept:
            logging.getLogger("actors").removeHandler(each)
