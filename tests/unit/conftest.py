"""Fixtures of several files."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
import ray

from rayrlhf.rewards import posting
from tests.servers import Answer, Server


@pytest.fixture(scope="session", autouse=True)
def no_ray() -> None:
    """The cluster of `tests/ray`, whose last file may have been this process's last one, takes CPU time for itself."""
    ray.shutdown()


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Answer], Server]]:
    monkeypatch.setattr(posting, "FIRST_WAIT_S", 0.001)
    servers: list[Server] = []

    def start(answer: Answer) -> Server:
        servers.append(Server(answer))
        threading.Thread(target=servers[-1].serve_forever, args=(0.01,), daemon=True).start()  # ends within 0.01 s
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()
