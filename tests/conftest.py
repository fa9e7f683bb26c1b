"""What all tests have: an environment and a cache of their own, their order, their times."""

import os
import tempfile

if "PYTEST_XDIST_WORKER" not in os.environ:  # a cache of their own, which both processes inherit from the first
    _cache = tempfile.TemporaryDirectory(prefix="rayrlhf-")  # deleted when it ends
    os.environ["RAYRLHF_CACHE"] = _cache.name

import pytest
from hypothesis import settings

import tests.environment  # noqa: F401 - before the modules below, which import what reads it
from tests.order import pytest_collection_modifyitems
from tests.times import pytest_configure, pytest_terminal_summary

__all__ = ["pytest_collection_modifyitems", "pytest_configure", "pytest_terminal_summary"]  # hooks

# The same examples in every run, so that a failure is a change of the code; no deadline on a shared machine.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


def pytest_addoption(parser: pytest.Parser) -> None:
    """An option of tests/e2e/test_families.py."""
    parser.addoption("--every-family", action="store_true", help="run each data set with every family of models")
