"""Which TCP ports are free on loopback."""

from __future__ import annotations

import socket
from pathlib import Path


def is_free(port: int, host: str = "127.0.0.1") -> bool:
    """Whether a server could listen there now; a port in TIME_WAIT counts as free."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
        return True


def any_free(*, room: int = 0) -> int:
    """A port that the system considers free, with at least `room` valid port numbers behind it."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        if port + room < 65536:
            return port


def remembered(file: Path) -> int:
    """The port kept in ``file`` while it is free, else a new one that is kept there.

    URLs signed before a restart stay good as long as the port stays the same.
    """
    if file.exists():
        text = file.read_text().strip()
        if text.isdecimal() and is_free(int(text)):
            return int(text)
    port = any_free()
    file.write_text(f"{port}\n")
    return port
