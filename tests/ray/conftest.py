"""A small Ray cluster for the tests, which never joins one that is already running on this machine."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator

import pytest
import ray

from jobs.cluster import loopback_only, start_private


@pytest.fixture(scope="session")
def _directory() -> Iterator[str]:
    """Short, because it holds Unix sockets."""
    directory = tempfile.mkdtemp(prefix="ray", dir="/tmp")
    yield directory
    ray.shutdown()
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="module")
def ray_cluster(_directory: str) -> None:
    """Two CPUs, no dashboard, as private as that of a run.

    It goes on for the files that follow: a test ends the actors that it has started.
    """
    if not ray.is_initialized():
        with loopback_only():  # its processes inherit that
            start_private(num_cpus=2, include_dashboard=False, _temp_dir=_directory)


@pytest.fixture(scope="module")
def no_ray() -> None:
    """For a file with a cluster of its own: the shared one ends, and starts anew for the next file that wants it."""
    ray.shutdown()
