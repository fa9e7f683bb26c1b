"""A run's own cluster, which anyone who reaches it could have run code: nobody but this machine does."""

from __future__ import annotations

import ipaddress
import os
import tempfile

import psutil  # type: ignore[import-untyped]
import pytest
import ray

from jobs.cluster import connected
from rayrlhf.config_file import parse_config

pytestmark = pytest.mark.timeout(200)


def listening() -> set[str]:
    """Addresses on which this process and its descendants take connections."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    found = [c for process in processes for c in process.net_connections(kind="tcp") if c.status == psutil.CONN_LISTEN]
    return {c.laddr.ip for c in found}


class Actor:
    def pid(self) -> int:
        return os.getpid()


def test_a_private_cluster_listens_on_the_loopback_address_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    before = listening()
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as directory:
        monkeypatch.setenv("RAY_TMPDIR", directory)
        with connected(parse_config({"name": "private"}, "test")):
            assert ray.get(ray.remote(Actor).remote().pid.remote(), timeout=100) != os.getpid()
            address = ray.get_runtime_context().gcs_address
            found = listening() - before
    assert found and all(
        (ip.ipv4_mapped or ip).is_loopback if isinstance(ip, ipaddress.IPv6Address) else ip.is_loopback
        for ip in map(ipaddress.ip_address, found)
    ), found
    assert address.startswith("127.0.0.1:")
