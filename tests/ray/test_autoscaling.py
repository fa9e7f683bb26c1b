"""cluster.yaml's own node types under Ray's autoscaler, with Ray's provider of fake nodes in place of a cloud's.

A run that waits for nodes gets those that its config names, and they leave when nobody uses them.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import ray.autoscaler.v2.utils
import yaml
from ray.autoscaler._private.util import prepare_config

from jobs.cluster import LOCAL_ENVIRONMENT, preflight
from rayrlhf.config import Config
from rayrlhf.config_file import load_config

ROOT = Path(__file__).parents[2]
HEAD = "f" * 51 + "00000"
"""The id that the provider of fake nodes expects of the head."""


@pytest.fixture
def autoscaler(no_ray: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A head of cluster.yaml with an autoscaler; the test is connected to it."""
    # Ray asks once a process which autoscaler there is, and other tests have had clusters without.
    monkeypatch.setattr(ray.autoscaler.v2.utils, "cached_is_autoscaler_v2", None)
    directory = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))  # short: it holds Unix sockets
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    cluster = prepare_config(yaml.safe_load((ROOT / "cluster.yaml").read_text()))  # as `ray up` hands it to the head
    # The provider of fake nodes knows its head by this name.
    cluster["available_node_types"]["ray.head.default"] = cluster["available_node_types"].pop("head")
    cluster["head_node_type"] = "ray.head.default"
    cluster["idle_timeout_minutes"] = 0.1
    cluster["provider"] = {
        "type": "external",
        "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
        "launch_multiple": True,
        "gcs_address": f"127.0.0.1:{port}",
        "head_node_id": HEAD,
    }
    file = directory / "autoscaler.yaml"
    file.write_text(yaml.safe_dump(cluster))
    environment = {
        **os.environ, **LOCAL_ENVIRONMENT, "RAY_FAKE_CLUSTER": "1", "RAY_enable_autoscaler_v2": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_CLOUD_INSTANCE_ID": HEAD, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD,
    }  # fmt: skip
    command = [
        str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--node-ip-address=127.0.0.1",
        f"--port={port}", "--num-cpus=0", "--include-dashboard=false", f"--autoscaling-config={file}",
        f"--temp-dir={directory}/ray", "--labels=rayrlhf.io/role=head",
    ]  # fmt: skip
    with (directory / "log").open("w") as log:
        head = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 600
        while "Ray runtime started" not in (directory / "log").read_text():  # connecting before would end this process
            assert head.poll() is None and time.monotonic() < deadline, (directory / "log").read_text()[-2000:]
            time.sleep(0.5)
        ray.init(f"127.0.0.1:{port}", log_to_driver=False)
        yield
    finally:
        ray.shutdown()
        os.killpg(head.pid, signal.SIGKILL)
        head.wait(30)
        shutil.rmtree(directory, ignore_errors=True)


def roles() -> Counter[str]:
    return Counter(node["Labels"]["rayrlhf.io/role"] for node in ray.nodes() if node["Alive"])


def smaller() -> Config:
    """The cluster's config with fewer actors: each fake node is a real raylet."""
    changes = ["resources.generators.count=1", "resources.scorers.count=1", "resources.learner.workers=2"]
    return load_config(ROOT / "configs/tldr_opt_1b_cluster.yaml", [*changes, "resources.wait_for_nodes_s=120"])


# `ray start` gives its node 30 s, which a busy machine exceeds, and does not try again.
@pytest.mark.long
def test_nodes_come_for_a_run_and_leave_after_it(autoscaler: None) -> None:
    assert roles() == {"head": 1}
    table = preflight(smaller())
    assert roles() == {"head": 1, "learner": 1, "generator": 2}
    assert table.row_count == 3
    deadline = time.monotonic() + 600
    while roles() != {"head": 1}:  # nothing was started on them: they are idle from now on
        assert time.monotonic() < deadline, f"nodes stayed: {roles()}"
        time.sleep(1)
