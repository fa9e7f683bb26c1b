"""The driver hears of deaths, restarts and stragglers: it asks the coordinator, whose warnings nobody else sees."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence

import ray
from ray.exceptions import RayError

from actors.pools.announcing import Announcement
from actors.pools.monitoring import CONTROL
from actors.pools.remote import ActorFailure, Remote, wait

_ASK_S = 2.0
"""Between two questions."""
_ANSWER_S = 60.0
"""A coordinator that starts answers when it is up."""
_LAST_S = 2.0
"""How long the end of a run waits for the last announcements."""

Announce = Callable[[str, str], None]
"""Gets a line for the user, and the whole of it for the error log."""


class Listener:
    """Passes on what a coordinator has to tell, from a thread, until `close`."""

    def __init__(self, coordinator: Remote, announce: Announce) -> None:
        self._coordinator, self._announce = coordinator, announce
        self._process, self._heard = "", 0
        """Which process has spoken, and how often; another one may have taken its place."""
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="announcements", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Hear the last announcements, and end."""
        self._closing.set()
        self._thread.join(_LAST_S)
        if not self._thread.is_alive():
            self._ask(_LAST_S)

    def _listen(self) -> None:
        while not self._closing.wait(_ASK_S):
            self._ask(_ANSWER_S)

    def _ask(self, limit_s: float) -> None:
        if not ray.is_initialized():  # a call would start another cluster
            return
        # A coordinator that is dead or late is a matter of whoever waits for its work.
        with contextlib.suppress(ActorFailure, RayError):
            call = self._coordinator.submit_beside(CONTROL, "announcements", self._process, self._heard)
            news: Sequence[Announcement]
            process, news = wait([call], limit_s)[0]
            self._heard = len(news) + (self._heard if process == self._process else 0)
            self._process = process
            for each in news:
                self._announce(each.line, each.whole)
