"""`ray up` of cluster.local.yaml over ssh to this machine, a stage submitted to that cluster, and `ray down`.

Replaced is what a machine of one's own is: address, user, key, ports, and the installation, which is this environment.
"""

from __future__ import annotations

import getpass
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

# Minutes for Ray's own launcher, which is no part of this project: what is ours of it are the files that it reads, and
# unit/test_deploy checks those. The job that it ends with is as in e2e/test_jobs.
pytestmark = pytest.mark.long
ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


def free_ports(count: int) -> list[int]:
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(listener.getsockname()[1]) for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


class Machine(NamedTuple):
    """This one, as `ray up` sees it over ssh."""

    directory: Path
    file: Path
    environment: dict[str, str]
    dashboard: str

    def ray(self, *arguments: str, timeout_s: float = 200) -> str:
        """A `ray` command of the user's, its output; an error fails the test."""
        done = subprocess.run(
            [str(BIN / "ray"), *arguments], env=self.environment, cwd=ROOT, capture_output=True, text=True,
            timeout=timeout_s, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert done.returncode == 0, f"ray {arguments}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout + done.stderr


@pytest.fixture
def machine() -> Iterator[Machine]:
    for tool in ("ssh", "ssh-keygen", "rsync", "unshare"):
        assert shutil.which(tool), f"`ray up` needs {tool}; see the Makefile's test-tools"
    directory = Path(tempfile.mkdtemp(prefix="up", dir="/tmp"))  # short: it holds Unix sockets
    home, client = directory / "home", directory / "client"
    home.mkdir()
    client.mkdir()
    (home / ".bashrc").touch()
    (home / "env").symlink_to(BIN.parent)
    for name in ("host_key", "client_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", directory / name], check=True)
    ssh_port, gcs_port, dashboard_port = free_ports(3)
    namespace = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if os.getuid():
        namespace += ["--user", "--map-root-user"]
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"}
    server = subprocess.Popen(
        [*namespace, sys.executable, str(Path(__file__).with_name("ssh_server.py")), str(ssh_port), str(directory)],
        stdout=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    try:
        assert server.stdout and server.stdout.readline() == "listening\n"
        cluster = yaml.safe_load((ROOT / "cluster.local.yaml").read_text())
        cluster["cluster_name"] = directory.name
        cluster["provider"] |= {"head_ip": "127.0.0.1", "worker_ips": []}
        cluster["auth"] = {
            "ssh_user": getpass.getuser(),
            "ssh_private_key": str(directory / "client_key"),
            # There is no key for a port; %h is 127.0.0.1.
            "ssh_proxy_command": f"bash -c 'exec 3<>/dev/tcp/%h/{ssh_port}; cat <&3 & exec cat >&3'",
        }
        cluster["setup_commands"] = cluster["setup_commands"][-1:]  # the paths, without the installation
        ports = f"--port={gcs_port} --dashboard-port={dashboard_port} --dashboard-agent-listen-port=0 --num-cpus=2"
        cluster["head_start_ray_commands"] = [
            command.replace("--port=6379", f"{ports} --temp-dir={directory}/ray --disable-usage-stats")
            for command in cluster["head_start_ray_commands"]
        ]
        file = directory / "cluster.yaml"
        file.write_text(yaml.safe_dump(cluster))
        environment |= {"HOME": str(client), "RAY_AUTH_MODE": "token"}
        yield Machine(directory, file, environment, f"http://127.0.0.1:{dashboard_port}")
    finally:
        server.kill()  # and with it everything in its PID namespace
        server.wait()
        shutil.rmtree(directory, ignore_errors=True)
        for left in Path("/tmp/ray").glob(f"cluster-{directory.name}.*"):  # where Ray notes a local cluster
            left.unlink()


def test_a_cluster_comes_up_takes_a_stage_and_goes(machine: Machine, finished: Any, tmp_path: Path) -> None:
    (machine.directory / "client" / ".ray").mkdir()
    machine.ray("get-auth-token", "--generate")
    said = machine.ray("up", "--yes", "--no-config-cache", str(machine.file))
    assert "Ray runtime started" in said
    assert (machine.directory / "home/rayrlhf/jobs/pipeline.py").is_file(), "the project is there"
    assert not (machine.directory / "home/rayrlhf/.venv").exists(), "and what .rayignore names is not"
    tokens = {(machine.directory / place / ".ray/auth_token").read_text().strip() for place in ("client", "home")}
    assert len(tokens) == 1 and len(tokens.pop()) > 30
    status = machine.ray("exec", "--no-config-cache", str(machine.file), "ray status")
    assert "0.0/2.0 CPU" in status

    run = tmp_path / "quick"
    shutil.copytree(finished.path, run, ignore=shutil.ignore_patterns("evaluation.json", "samples.parquet"))
    command = ["submit", "evaluate", *finished.arguments, f"runs_dir={tmp_path}", "--address", machine.dashboard]
    strangers = {**machine.environment, "HOME": str(tmp_path)}
    refused = subprocess.run(
        [str(BIN / "rayrlhf"), *command], env=strangers, cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert refused.returncode == 2 and "does not take jobs" in refused.stderr, "without the token nobody gets in"
    done = subprocess.run(
        [str(BIN / "rayrlhf"), *command], env=machine.environment, cwd=ROOT, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "evaluate: done in" in done.stdout
    assert json.loads((run / "evaluation.json").read_text())["policy"]["reward"]["n"] > 0

    machine.ray("down", "--yes", str(machine.file))
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", int(machine.dashboard.rsplit(":", 1)[1])), timeout=5)
