"""An ssh server for a test: `python ssh_server.py PORT DIRECTORY`; there are host_key, client_key.pub and home/.

It runs commands as the user who started it, with DIRECTORY/home as their home and only what is in its own PID
namespace in sight, so that `ray stop` ends no one else's Ray.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from pathlib import Path
from typing import Any

import asyncssh


async def copy(source: Any, target: Any) -> None:
    """Until the source ends; the target ends with it if it is a program's input."""
    with contextlib.suppress(ConnectionError, asyncssh.Error):
        while data := await source.read(65536):
            target.write(data)
            await target.drain()
        if isinstance(target, asyncio.StreamWriter):
            target.close()


async def serve(port: int, directory: Path) -> None:
    environment = {**os.environ, "HOME": str(directory / "home")}

    async def run(process: asyncssh.SSHServerProcess[bytes]) -> None:
        pipe = asyncio.subprocess.PIPE
        child = await asyncio.create_subprocess_exec(
            "bash", "-c", process.command or "true", cwd=directory / "home", env=environment, start_new_session=True,
            stdin=pipe, stdout=pipe, stderr=pipe,
        )  # fmt: skip
        assert child.stdin and child.stdout and child.stderr
        feeding = asyncio.create_task(copy(process.stdin, child.stdin))
        # To their ends, and not to the child's: what it leaves running in the background has other ends to write to.
        await asyncio.gather(copy(child.stdout, process.stdout), copy(child.stderr, process.stderr))
        code = await child.wait()
        feeding.cancel()
        process.exit(code if code >= 0 else 128 - code)

    await asyncssh.listen(
        "127.0.0.1", port, server_host_keys=[str(directory / "host_key")],
        authorized_client_keys=str(directory / "client_key.pub"), process_factory=run, encoding=None,
    )  # fmt: skip
    print("listening", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1]), Path(sys.argv[2])))
