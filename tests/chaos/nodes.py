"""A Ray cluster of three nodes on this machine, of which one goes at a time, as a spot instance does."""

from __future__ import annotations

import random
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import ray

from tests.commands import Command
from tests.sockets import free_port

START_S = 180
"""A node that is not up then did not start: Ray itself gives up earlier, and another one is tried."""
_OPTIONS = (
    "--block",
    "--min-worker-port=0",  # any free one: by default all nodes of a machine take theirs from the same 10,000
    "--max-worker-port=0",
    "--dashboard-agent-listen-port=0",
    f"--object-store-memory={400 * 2**20}",
    "--disable-usage-stats",
)
_ACTOR = r"ray::(Generator|Scorer|Coordinator|RayTrainWorker|TrainController)"
"""How the command line of an actor of a run begins. Ray itself has actors that stay, and tasks."""


class Nodes:
    """A head, which has the command's own process and the coordinator, and two nodes, which have everything else.

    Either node has room for all actors of a run, so the run can go on with the other one.
    """

    def __init__(self, logs: Path, environment: Mapping[str, str] = MappingProxyType({})) -> None:
        """
        Args:
            logs: a directory for what the nodes print.
            environment: variables of all processes besides those of this one.
        """
        self._logs, self._environment = logs, environment
        self._head: Command | None = None
        self._others: list[Command] = []
        self.address = ""

    def ready(self) -> None:
        """Start what does not live; returns once a command finds all three nodes."""
        if not (self._head and _up(self._head)):
            self.end()
            port = free_port()
            self.address = f"{ray.util.get_node_ip_address()}:{port}"
            self._head = self._started(["--head", "--num-cpus=0", f"--port={port}", "--include-dashboard=false"])
        for node in [node for node in self._others if not _wait_for(node)]:
            self._forget(node)
        while len(self._others) < 2:  # one after the other: of two that start at once neither comes up
            self._others.append(self._started(self._joining()))

    def lose(self, chance: random.Random) -> str:
        """One node is gone at once, with its actors and its objects, and another one is on its way.

        Returns:
            The actors that were on it.
        """
        node = chance.choice(self._others)
        actors = sorted(line.split()[0] for line in node.processes().values() if re.match(_ACTOR, line))
        self._forget(node)
        self._others.append(self._command(self._joining()))
        return f"a node with {', '.join(actors) or 'no actors'}"

    def processes(self) -> dict[int, str]:
        """Command lines of all processes of the cluster, by pid."""
        nodes = [*([self._head] if self._head else []), *self._others]
        return {pid: line for node in nodes for pid, line in node.processes().items()}

    def actors(self) -> dict[int, str]:
        """Command lines of the actors of runs, by pid."""
        return {pid: line for pid, line in self.processes().items() if re.match(_ACTOR, line)}

    def end(self) -> None:
        """Kill all that is left."""
        for node in [*self._others, *([self._head] if self._head else [])]:
            node.end()
        self._head, self._others = None, []

    def _joining(self) -> list[str]:
        return [f"--address={self.address}", "--num-cpus=2"]

    def _started(self, options: Sequence[str]) -> Command:
        for _ in range(3):
            node = self._command(options)
            if _wait_for(node):
                return node
            node.end()
        raise AssertionError(f"Ray does not start; see {self._logs}")

    def _command(self, options: Sequence[str]) -> Command:
        program = str(Path(sys.executable).parent / "ray")
        return Command([program, "start", *options, *_OPTIONS], self._logs, self._environment)

    def _forget(self, node: Command) -> None:
        node.end()
        self._others.remove(node)


def _up(node: Command) -> bool:
    return node.process.poll() is None and node.says("Ray runtime started")


def _wait_for(node: Command) -> bool:
    """Returns whether it is up, once that is known."""
    deadline = time.monotonic() + START_S
    while node.process.poll() is None and time.monotonic() < deadline:
        if _up(node):
            return True
        time.sleep(0.2)
    return False
