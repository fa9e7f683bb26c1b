"""A command whose own Ray dies under it ends at once, in one line, and leaves no process."""

from __future__ import annotations

import os
import re
import signal
import sys
from pathlib import Path

import pytest

from tests.chaos.faults import ROLES
from tests.commands import Command

WAITING = """
import ray
from jobs.cluster import connected
from rayrlhf.config_file import parse_config

@ray.remote
class Idle:
    def answer(self):
        return 42

config = {"name": "private", "resources": {"dashboard": False}}
with connected(parse_config(config, "test")):
    idle = Idle.remote()
    print(ray.get(idle.answer.remote()), flush=True)
    ray.get(ray.remote(lambda: __import__("time").sleep(10**6)).remote())
"""


@pytest.mark.parametrize("role", ["gcs", "raylet"])
def test_a_command_without_its_ray_ends_in_a_line(role: str, tmp_path: Path) -> None:
    command = Command([sys.executable, "-c", WAITING], tmp_path)
    try:
        command.wait_for_line("42")
        [pid] = [pid for pid, line in command.processes().items() if re.search(ROLES[role], line)]
        os.kill(pid, signal.SIGKILL)
        outcome = command.wait()
        assert outcome.code == 1
        [said] = [line for line in outcome.err.splitlines() if line.startswith("failed: ")]
        name = {"gcs": "Ray's head (gcs_server)", "raylet": "Ray's raylet (raylet)"}[role]
        assert said.startswith(f"failed: {name} ended with code -9: ") and len(said) <= 300
        assert "the same command continues" in said
        logs = said.rpartition("Ray's logs: ")[2]
        assert logs.startswith(str(command.ray_directory)) and Path(logs).is_dir()
        command.wait_until(lambda: not command.processes(), "its processes end", running=False)
    finally:
        command.end()
