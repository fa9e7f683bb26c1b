"""What processes hold in shared memory, such as semaphores, and what of it others can still open by its name."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

SHARED = Path("/dev/shm")


def held(pids: Iterable[int]) -> set[int]:
    """Inodes in shared memory that are mapped by these processes, with or without a name."""
    found: set[int] = set()
    for pid in pids:
        try:
            maps = Path(f"/proc/{pid}/maps").read_text()
        except OSError:  # it has ended since
            continue
        found |= {int(inode) for inode in re.findall(rf" (\d+) +{SHARED}/", maps)}
    return found


def named(inodes: set[int]) -> set[str]:
    """Names of those that a kill of these processes would leave behind, or has left."""
    return {path.name for path in SHARED.iterdir() if path.lstat().st_ino in inodes}
