"""What is closed in the configuration that Ray writes for HAProxy."""

import os
from pathlib import Path

import pytest

from serve_app.stack.haproxy import closed, environment

CONFIGURATION = """global
    stats socket /tmp/x/admin.sock mode 666 level admin expose-fd listeners
frontend prometheus
    bind :9101
frontend http_frontend
    bind 127.0.0.1:8000
backend app
    server one 10.1.2.3:30001 check
    server two node-7:30002 check backup
listen stats
  bind *:8404
"""


def test_what_ray_binds_everywhere_is_bound_to_loopback() -> None:
    binds = [line.strip() for line in closed(CONFIGURATION).splitlines() if "bind" in line]
    assert binds == ["bind 127.0.0.1:9101", "bind 127.0.0.1:8000", "bind 127.0.0.1:8404"]


def test_the_admin_socket_is_the_owners() -> None:
    assert "mode 600 level admin" in closed(CONFIGURATION)


def test_replicas_are_reached_where_they_listen() -> None:
    servers = [line.split()[2] for line in closed(CONFIGURATION, "10.0.0.5").splitlines() if "server " in line]
    assert servers == ["10.0.0.5:30001", "10.0.0.5:30002"]


def test_a_closed_configuration_stays_as_it_is() -> None:
    assert closed(closed(CONFIGURATION)) == closed(CONFIGURATION)


@pytest.mark.parametrize(
    ("host", "replicas_at"), [("127.0.0.1", "127.0.0.1"), ("::", "127.0.0.1"), ("10.0.0.5", "10.0.0.5")]
)
def test_ray_is_pointed_at_files_that_only_the_owner_reads(tmp_path: Path, host: str, replicas_at: str) -> None:
    found = environment(tmp_path / "h", host=host, stats_port=1, replica_port=2)
    launcher = Path(found["RAY_SERVE_HAPROXY_BINARY_PATH"])
    assert os.access(launcher, os.X_OK)
    assert f" {replicas_at} " in launcher.read_text()
    assert (tmp_path / "h").stat().st_mode & 0o077 == 0
    assert all(str(tmp_path) in found[name] for name in found if name.endswith(("_LOC", "_PATH", "_FILE")))
