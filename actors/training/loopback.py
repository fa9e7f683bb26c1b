"""Torch's process group of workers on one machine, in which nothing listens on the network."""

from __future__ import annotations

import os
import sys
import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from ray.train.torch import TorchConfig
from ray.train.torch.config import _set_torch_distributed_env_vars, _TorchBackend


@dataclass
class LoopbackTorchConfig(TorchConfig):
    """Ranks meet through a file, and gloo and NCCL use the loopback interface.

    TorchConfig's store (torch's TCPStore) listens on every interface of the machine, and whoever reaches it can write
    into it.
    """

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _LoopbackBackend


class _LoopbackBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: LoopbackTorchConfig) -> None:
        meeting = Path(tempfile.gettempdir()) / f"rayrlhf-ranks-{uuid.uuid4().hex}"  # a new one for every start
        worker_group.execute(_set_torch_distributed_env_vars)
        world = len(worker_group)
        ray.get([
            worker_group.execute_single_async(rank, join_ranks, backend_config.backend, rank, world, str(meeting))
            for rank in range(world)
        ])  # fmt: skip


def join_ranks(backend: str, rank: int, world: int, meeting: str) -> None:
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    os.environ.update(GLOO_SOCKET_IFNAME=loopback, NCCL_SOCKET_IFNAME=loopback)
    torch.distributed.init_process_group(backend, init_method=f"file://{meeting}", rank=rank, world_size=world)
