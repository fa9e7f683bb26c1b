"""Where the commands listen that serve something: `label`, `report --watch` and `serve`."""

from __future__ import annotations

import socket

from rayrlhf.errors import UserError

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def listen(host: str, port: int, command: str) -> socket.socket:
    """A socket that listens there for a command; port 0 takes any that is free.

    Raises:
        UserError: the port is taken, or the host is not this machine.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise UserError(
            f"{command}: cannot listen at {host} port {port} ({error.strerror}); give another --port"
        ) from None
