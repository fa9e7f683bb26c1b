"""Sockets of this process and of all that it has started."""

from __future__ import annotations

import ipaddress
import socket

import psutil


def listening(pids: list[int] | None = None) -> set[str]:
    """Addresses on which processes take connections or datagrams.

    Args:
        pids: of the processes; None: this one and its descendants.
    """
    if pids is None:
        processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    else:
        processes = [psutil.Process(pid) for pid in pids]
    found: set[str] = set()
    for process in processes:
        try:
            sockets = process.net_connections(kind="inet")
        except psutil.NoSuchProcess:  # it has ended since
            continue
        for each in sockets:
            if each.status == psutil.CONN_LISTEN or (each.type == socket.SOCK_DGRAM and not each.raddr):
                found.add(each.laddr.ip)
    return found


def beyond_loopback(addresses: set[str]) -> set[str]:
    """Those that another machine may reach."""
    found = {each: ipaddress.ip_address(each) for each in addresses}
    own = {each: getattr(ip, "ipv4_mapped", None) or ip for each, ip in found.items()}
    return {each for each, ip in own.items() if not ip.is_loopback}


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
