"""A small Ray cluster of its own for the tests, which never joins one that is already running on this machine."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator

import pytest
import ray

from jobs.cluster import start_private


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    """Two CPUs, no dashboard. The directory is short because it holds Unix sockets."""
    directory = tempfile.mkdtemp(prefix="ray", dir="/tmp")
    start_private(num_cpus=2, include_dashboard=False, _temp_dir=directory)
    yield
    ray.shutdown()
    shutil.rmtree(directory, ignore_errors=True)
