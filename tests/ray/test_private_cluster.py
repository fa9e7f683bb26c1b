"""A run's own cluster on a machine that others use, too: with a token, only those come in who have it."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import tempfile

import httpx
import pytest

PRIVATE = """
import ray
from jobs.cluster import connected
from rayrlhf.config_file import parse_config
with connected(parse_config({"name": "private"}, "test")):
    worker = ray.get(ray.remote(lambda: 42).remote())
    print(ray.get_runtime_context().gcs_address, ray._private.worker._global_node.webui_url, worker, flush=True)
    input()
"""
JOINING = """
import sys, ray
from jobs.cluster import loopback_only
with loopback_only():
    ray.init(sys.argv[1], log_to_driver=False)
    print(ray.get(ray.remote(lambda: 42).remote()))
"""


# A cluster, and two processes that try to join it.
@pytest.mark.long
def test_with_a_token_a_private_cluster_takes_nobody_without_it() -> None:
    token = secrets.token_hex(32)
    private = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "RAY_AUTH_MODE")}
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as directory:
        look_at_a_private_cluster(private | {"RAY_TMPDIR": directory}, token)


def look_at_a_private_cluster(private: dict[str, str], token: str) -> None:
    """Start one with the token, and try to come in with it, without it and with another one."""
    known = private | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    strangers = {
        "none": private | {"RAY_AUTH_MODE": "disabled"},
        "wrong": private | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)},
    }
    run = subprocess.Popen(
        [sys.executable, "-c", PRIVATE], env=known, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert run.stdin and run.stdout
        gcs, dashboard, said = run.stdout.readline().split()
        assert said == "42" and gcs.startswith("127.0.0.1:")
        jobs = f"http://{dashboard}/api/jobs/"
        with httpx.Client(trust_env=False) as client:
            assert client.get(jobs).status_code == 401
            assert client.get(jobs, headers={"Authorization": f"Bearer {'0' * 64}"}).status_code == 403
            assert client.get(jobs, headers={"Authorization": f"Bearer {token}"}).status_code == 200

        def join(environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
            command = [sys.executable, "-c", JOINING, gcs]
            return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)

        assert join(known).stdout == "42\n"
        for name, environment in strangers.items():
            refused = join(environment)
            assert refused.returncode and "42" not in refused.stdout, name
    finally:
        run.communicate("\n", timeout=600)
