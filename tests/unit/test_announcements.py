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
    kept = Announcements()
    try:

        class Coordinator:
            def announcements(self, heard: int) -> Sequence[Announcement]:
                return kept.since(heard)

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
        listener.close()
        assert heard == [("generator-0 died", "its stacks"), ("generator-1 died", "")]
    finally:
        logging.getLogger("actors").removeHandler(kept)
