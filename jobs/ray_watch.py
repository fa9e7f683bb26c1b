"""A private Ray that loses its head or its raylet ends the command at once, in one line.

Ray itself waits a minute for a head that nobody starts again, and then ends this process without a word of ours.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import ray
from ray._private.node import Node
from ray._private.ray_constants import PROCESS_TYPE_GCS_SERVER, PROCESS_TYPE_RAYLET

from rayrlhf.terminal import complain

_NAMES = {PROCESS_TYPE_GCS_SERVER: "Ray's head", PROCESS_TYPE_RAYLET: "Ray's raylet"}
_LOOK_S = 0.5
"""Seconds between two looks at the processes."""


@contextmanager
def ending_with_ray() -> Iterator[None]:
    """In the block, this process ends with exit code 1 as soon as the Ray that it has started cannot go on.

    It ends as by a kill: nothing that the block has around it is done. A run is safe from that at any moment.
    """
    node, over = ray._private.worker._global_node, threading.Event()

    def watch() -> None:
        while not over.wait(_LOOK_S):
            dead = [each for each in node.dead_processes() if each[0] in _NAMES]
            if dead and not over.is_set():
                _end(node, *dead[0])

    watcher = threading.Thread(target=watch, name="watches Ray", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()  # before Ray ends its processes itself
        watcher.join()


def _end(node: Node, kind: str, process: subprocess.Popen[bytes]) -> None:
    complain(
        f"failed: {_NAMES[kind]} ({kind}) ended with code {process.returncode}: kill -9, a crash, or out of memory, "
        "which `dmesg` tells; finished stages and checkpoints are kept; the same command continues; "
        f"Ray's logs: {node.get_logs_dir_path()}"
    )
    sys.stdout.flush()
    try:
        [raylet] = node.all_processes[PROCESS_TYPE_RAYLET]
        node.kill_all_processes(check_alive=False, allow_graceful=False)  # and forgets them
        for actor in _started_by(raylet.process.pid):  # it would look for Ray's head for a minute, and keep its memory
            with contextlib.suppress(psutil.Error):
                actor.kill()
    finally:
        os._exit(1)


def _started_by(raylet: int) -> Iterator[psutil.Process]:
    """The processes of a raylet, also once it is dead: Ray puts its pid into their environment."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # gone meanwhile, or of another user
            if process.environ().get("RAY_RAYLET_PID") == str(raylet):
                yield process
