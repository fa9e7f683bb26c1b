"""A small Ray cluster of its own for the tests, which never joins one that is already running on this machine."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator

import pytest
import ray

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["RAY_AUTH_MODE"] = "disabled"


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    """Two CPUs, no dashboard. The directory is short because it holds Unix sockets."""
    directory = tempfile.mkdtemp(prefix="ray", dir="/tmp")
    ray.init(address="local", num_cpus=2, include_dashboard=False, _temp_dir=directory, log_to_driver=False)
    yield
    ray.shutdown()
    shutil.rmtree(directory, ignore_errors=True)
