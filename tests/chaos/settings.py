"""The settings of runs that meet faults: on which cluster, by how many learners, how far ahead, over which network."""

from __future__ import annotations

import random
from dataclasses import dataclass

CHANGES = ("rl.steps=6", "rl.checkpoint_every=1", "resources.learner.cpus=0.5")
"""Of the shrunken quick start, for all runs. Half a CPU each, so that two ranks fit beside the other actors."""
AHEAD_STEPS = 2
_DELAYS_MS = {
    "CoreWorkerService.grpc_server.PushTask": 100,  # a call arrives
    "CoreWorkerService.grpc_client.PushTask": 100,  # its answer arrives
    "CoreWorkerService.grpc_server.GetObjectStatus": 100,
    "ObjectManagerService.grpc_server.Pull": 100,
    "NodeManagerService.grpc_client.RequestWorkerLease": 300,
    "InternalKVGcsService.grpc_server.InternalKVMultiGet": 100,  # what the heartbeat reads
}
_SLOW_NETWORK = {"RAY_testing_asio_delay_us": ",".join(f"{name}=10000:{most}000" for name, most in _DELAYS_MS.items())}
"""Ray hands these messages on 10 ms to so many ms late: an actor answers in 120 ms where it took 3. Ray's own tests use
this variable. With all messages alike 5 ms late, Ray does not start."""


@dataclass(frozen=True)
class Setting:
    """The setting of one run."""

    ranks: int = 1
    """Learner ranks."""
    ahead: bool = False
    """Whether generators are up to `AHEAD_STEPS` steps ahead of the learner. Then two runs differ from `rl` on."""
    nodes: bool = False
    """Whether it is on a cluster of several nodes (tests/chaos/nodes.py), not on one of its own."""
    slow_network: bool = False

    @property
    def changes(self) -> list[str]:
        """What its command says of it."""
        ahead = [f"rl.max_staleness={AHEAD_STEPS}"] if self.ahead else []
        return [*CHANGES, f"resources.learner.workers={self.ranks}", *ahead]

    @property
    def environment(self) -> dict[str, str]:
        """Variables of all its processes."""
        return _SLOW_NETWORK if self.slow_network else {}

    def __str__(self) -> str:
        words = {f"{self.ranks} ranks": self.ranks > 1, "ahead": self.ahead, "several nodes": self.nodes}
        words["slow network"] = self.slow_network
        return ", ".join(word for word, holds in words.items() if holds) or "plain"


def draw_setting(chance: random.Random) -> Setting:
    """A setting, decided by `chance`: each special one for a quarter of the runs, independently of the others."""
    special = [chance.random() < 0.25 for _ in range(4)]
    return Setting(1 + special[0], *special[1:])
