"""Environment of all tests, set before Ray, vLLM or transformers are imported; child processes inherit it."""

import os
import tempfile

if "PYTEST_XDIST_WORKER" not in os.environ:  # a cache of their own, which both processes inherit from the first
    _cache = tempfile.TemporaryDirectory(prefix="rayrlhf-")  # deleted when it ends
    os.environ["RAYRLHF_CACHE"] = _cache.name

os.environ.update(
    HF_HUB_OFFLINE="1",  # nothing is fetched: a test that needs the hub fails at once
    OMP_WAIT_POLICY="passive",  # two tests at a time share the cores: a thread that waits must not spin
    RAY_AUTH_MODE="disabled",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_prestart_worker_first_driver="0",  # as `jobs.cluster.LOCAL_ENVIRONMENT` has it, for clusters that tests start
    RAY_worker_niceness="0",  # Ray's 15 starves its actors beside anything else that runs, and their tests time out
    RAY_agent_register_timeout_ms="120000",  # a node ends itself when its agents are not up in 15 s
    VLLM_NO_USAGE_STATS="1",
    VLLM_PLUGINS="",  # torchrl, which tests/oracles need, is one: every engine would import it, for 3 s of CPU time
)

import pytest
from hypothesis import settings  # after the environment above, which it may import others with

from tests.order import pytest_collection_modifyitems
from tests.times import pytest_configure, pytest_terminal_summary

__all__ = ["pytest_collection_modifyitems", "pytest_configure", "pytest_terminal_summary"]  # hooks

# The same examples in every run, so that a failure is a change of the code; no deadline on a shared machine.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


def pytest_addoption(parser: pytest.Parser) -> None:
    """An option of tests/e2e/test_families.py."""
    parser.addoption("--every-family", action="store_true", help="run each data set with every family of models")
