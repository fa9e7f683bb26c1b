"""Ray clusters of several nodes on this machine, for tests of what happens between nodes."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

from jobs.cluster import LOCAL_ENVIRONMENT


@contextmanager
def cluster_of_nodes(head_cpus: int, *nodes: dict[str, Any]) -> Iterator[Cluster]:
    """A head, and a node for each mapping (arguments of `Cluster.add_node`); this process is connected to it."""
    directory = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # short: it holds Unix sockets
    # `Cluster` writes its address into $RAY_TMPDIR/ray (else /tmp/ray, where others look for one) and does not make it.
    (Path(directory) / "ray").mkdir()
    before = os.environ.get("RAY_TMPDIR")
    os.environ["RAY_TMPDIR"] = directory
    os.environ.update(LOCAL_ENVIRONMENT)
    cluster = Cluster()
    try:
        cluster.add_node(num_cpus=head_cpus, temp_dir=directory, include_dashboard=False)
        for node in nodes:
            cluster.add_node(**node)
        ray.init(cluster.address, log_to_driver=False)
        cluster.wait_for_nodes()
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()
        del os.environ["RAY_TMPDIR"]
        if before is not None:
            os.environ["RAY_TMPDIR"] = before
        shutil.rmtree(directory, ignore_errors=True)
