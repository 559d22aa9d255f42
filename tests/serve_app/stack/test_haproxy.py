"""What is mended in the configuration that Ray writes for HAProxy."""

import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from serve_app.stack.haproxy import Mending, door_of, environment, mended

CONFIGURATION = """global
    stats socket /tmp/x/admin.sock mode 666 level admin expose-fd listeners
defaults
    mode http
    errorfile 502 /tmp/x/500.http
    errorfile 503 /tmp/x/500.http
frontend prometheus
    bind :9101
frontend http_frontend
    bind 10.1.2.3:8000
backend default_backend
    http-request return status 404 content-type text/plain lf-string "Path"
backend app
    http-reuse always
    server SERVE_REPLICA::raylora#Ingress-abc123 10.1.2.3:30001 check
    server SERVE_REPLICA::raylora#Ingress-def456 10.1.2.4:30001 check
    server fallback 10.1.2.3:8500 check backup
listen stats
  bind *:8404
"""
BODIES = {"lost": {"/v2/": '{"a":1,"id":"REQUEST_ID"}', "": '{"b":2}'}, "refused": '{"c":3}'}


@pytest.fixture
def folder() -> Iterator[Path]:
    """With a short path: a socket's is limited to about 100 bytes."""
    with tempfile.TemporaryDirectory(prefix="rl", dir="/tmp") as name:
        yield Path(name)


def lines(folder: Path, host: str = "10.1.2.3") -> list[str]:
    door_of(folder, "abc123").touch()
    return [line.strip() for line in mended(CONFIGURATION, mending(folder, host)).splitlines()]


def mending(folder: Path, host: str = "10.1.2.3") -> Mending:
    return Mending(host, str(folder), "    # in defaults\n", "    # x-raylora-own in the frontend\n")


@pytest.mark.parametrize(("host", "bound"), [("10.1.2.3", "10.1.2.3"), ("127.0.0.1", "127.0.0.1"), ("::", "[::]")])
def test_only_the_http_port_is_bound_where_it_was_asked_for(folder: Path, host: str, bound: str) -> None:
    binds = [line for line in lines(folder, host) if line.startswith("bind")]
    assert binds == ["bind 127.0.0.1:9101", f"bind {bound}:8000", "bind 127.0.0.1:8404"]


def test_the_admin_socket_is_the_owners(folder: Path) -> None:
    assert any("mode 600 level admin" in line for line in lines(folder))


def test_requests_go_to_a_replicas_socket_and_checks_to_its_port_and_what_has_none_stays(folder: Path) -> None:
    servers = [line.split(maxsplit=2)[2] for line in lines(folder) if line.startswith("server ")]
    assert servers == [
        f"unix@{folder}/abc123.door check addr 127.0.0.1 port 30001",
        "10.1.2.4:30001 check",
        "10.1.2.3:8500 check backup",
    ]


def test_a_clients_first_request_gets_a_connection_that_nobody_has_used(folder: Path) -> None:
    assert [line for line in lines(folder) if line.startswith("http-reuse")] == ["http-reuse safe"]


def test_errors_are_not_rays_and_our_lines_stand_in_their_sections(folder: Path) -> None:
    found = lines(folder)
    assert not [line for line in found if line.startswith("errorfile") or "text/plain" in line]
    assert found[found.index("defaults") + 1] == "# in defaults"
    assert found[found.index("frontend http_frontend") + 2] == "# x-raylora-own in the frontend"


def test_a_mended_configuration_stays_as_it_is(folder: Path) -> None:
    once = mended(CONFIGURATION, mending(folder))
    assert mended(once, mending(folder)) == once


def test_ray_is_pointed_at_files_that_only_the_owner_reads(folder: Path) -> None:
    found = environment(folder / "h", host="127.0.0.1", **BODIES)
    assert os.access(found["RAY_SERVE_HAPROXY_BINARY_PATH"], os.X_OK)
    assert (folder / "h").stat().st_mode & 0o077 == 0
    assert all(str(folder) in found[name] for name in found if name.endswith(("_LOC", "_PATH", "_FILE")))


def test_no_two_of_rays_ports_are_the_same(folder: Path) -> None:
    found = environment(folder / "h", host="127.0.0.1", **BODIES)
    ports = [value for name, value in found.items() if re.search(r"_PORT$", name)]
    assert len(set(ports)) == len(ports)


def test_a_folder_that_others_can_enter_is_refused(folder: Path) -> None:
    (folder / "h").mkdir()
    (folder / "h").chmod(0o755)
    with pytest.raises(PermissionError):
        environment(folder / "h", host="127.0.0.1", **BODIES)


@pytest.mark.parametrize("text", ["it's", "100%"])
def test_a_body_that_haproxy_would_read_otherwise_is_refused(folder: Path, text: str) -> None:
    with pytest.raises(ValueError, match="cannot stand"):
        environment(folder / "h", host="127.0.0.1", lost={"": text}, refused="{}")
