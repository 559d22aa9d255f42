"""Which TCP ports are free."""

from __future__ import annotations

import random
from pathlib import Path

from storage.listening import obstacle_to

# Under them lie the ports of known services and those that Ray gives to workers by default (10002 to 19999).
FIRST_OWN_PORT = 20000
# Linux's own bounds where it does not tell: https://docs.kernel.org/networking/ip-sysctl.html
EPHEMERAL_BOUNDS = "/proc/sys/net/ipv4/ip_local_port_range"
EPHEMERAL_FIRST = 32768

_given: set[int] = set()


def is_free(port: int, host: str = "127.0.0.1") -> bool:
    """Whether a server could listen there now; a port in TIME_WAIT counts as free."""
    return obstacle_to(host, port) is None


def any_free(*, room: int = 0) -> int:
    """A port on which a server can be started later, as are the `room` ports behind it; another at each call.

    The system's own choice would be one of those from which it also serves outgoing connections and Ray's processes,
    of which an instance opens more than a hundred before the server's turn comes. Raises OSError if none is found.
    """
    until = _first_ephemeral()
    if until < FIRST_OWN_PORT + 100:
        until = EPHEMERAL_FIRST
    for _ in range(1000):
        port = random.randrange(FIRST_OWN_PORT, until - room)
        wanted = set(range(port, port + room + 1))
        if _given.isdisjoint(wanted) and all(map(is_free, wanted)):
            _given.update(wanted)
            return port
    raise OSError("no free port found")


def _first_ephemeral() -> int:
    try:
        return int(Path(EPHEMERAL_BOUNDS).read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return EPHEMERAL_FIRST


def remembered(file: Path, host: str = "127.0.0.1") -> int:
    """The port kept in ``file`` while it is free on ``host``, else a new one that is kept there.

    URLs signed before a restart stay good as long as the port stays the same.
    """
    if file.exists():
        text = file.read_text().strip()
        if text.isdecimal() and is_free(int(text), host):
            return int(text)
    port = any_free()
    file.write_text(f"{port}\n")
    return port
