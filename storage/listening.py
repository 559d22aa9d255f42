"""Whether a server could listen at an address, and the URL at which this machine then reaches it."""

from __future__ import annotations

import errno
import socket
from enum import Enum

EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}  # noqa: S104 compared with, not bound
"""Of a host that stands for all addresses of the machine, the one on loopback."""


class Obstacle(Enum):
    """Why nothing can listen: the port is in use; this machine has no such address; the user may not."""

    TAKEN = "taken"
    ADDRESS = "address"
    FORBIDDEN = "forbidden"


def obstacle_to(host: str, port: int) -> Obstacle | None:
    """None where a server could listen now; a port in TIME_WAIT counts as free."""
    try:
        with socket.socket(_family(host)) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        if isinstance(error, PermissionError):
            return Obstacle.FORBIDDEN
        return Obstacle.TAKEN if error.errno == errno.EADDRINUSE else Obstacle.ADDRESS
    return None


def free_port(host: str) -> int:
    """Of the system's choice. Raises OSError."""
    with socket.socket(_family(host)) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def reachable(host: str) -> str:
    """The address by which this machine reaches a server that listens on `host`."""
    return EVERYWHERE.get(host, host)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server by its `reachable` address."""
    return reachable(host) in {"localhost", "::1"} or reachable(host).startswith("127.")


def joined(host: str, port: int) -> str:
    """`host:port`, an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def url_of(host: str, port: int) -> str:
    """Of a server on this machine that listens on `host`."""
    return f"http://{joined(reachable(host), port)}"


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
