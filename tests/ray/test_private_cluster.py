"""A run's own cluster, which anyone who reaches it could have run code: nobody but this machine does."""

from __future__ import annotations

import ipaddress
import tempfile
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest
import ray
import torch

from actors.training.workers import Workers
from jobs.cluster import connected
from rayrlhf.config_file import parse_config
from rayrlhf.config_resources import LearnerConfig
from rayrlhf.models.ranks import Ranks


def listening() -> set[str]:
    """Addresses on which this process and its descendants take connections."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    found = [c for process in processes for c in process.net_connections(kind="tcp") if c.status == psutil.CONN_LISTEN]
    return {c.laddr.ip for c in found}


def meet(directory: Path) -> None:
    """A training loop whose ranks have talked to each other."""
    ranks = Ranks(threads=1)
    assert float(ranks.sum(torch.ones(1))) == 2.0
    (directory / f"rank-{ranks.rank}").touch()


# A cluster and two workers for what e2e/test_interrupt shows of one worker.
@pytest.mark.long
@pytest.mark.usefixtures("no_ray")
def test_a_private_cluster_and_its_learner_listen_on_the_loopback_address_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    before = listening()
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as directory:
        monkeypatch.setenv("RAY_TMPDIR", directory)
        with connected(parse_config({"name": "private"}, "test")):
            workers = Workers(LearnerConfig(workers=2, cpus=0.5), str(tmp_path), "private", local=False)
            workers.train(meet, tmp_path)  # they stay, and with them whatever they listen on
            assert {path.name for path in tmp_path.glob("rank-*")} == {"rank-0", "rank-1"}
            address = ray.get_runtime_context().gcs_address
            found = listening() - before
            workers.close()
    assert found and all(
        (ip.ipv4_mapped or ip).is_loopback if isinstance(ip, ipaddress.IPv6Address) else ip.is_loopback
        for ip in map(ipaddress.ip_address, found)
    ), found
    assert address.startswith("127.0.0.1:")
