"""What is found before anything starts, in words that say what to change."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from serve_app.settings import Settings
from serve_app.stack.checks import check, check_port
from serve_app.stack.errors import AddressUnusable, ModelMissing, PortForbidden, PortTaken
from serve_app.stack.ports import any_free
from storage.listening import Obstacle
from tests.addresses import needs_ipv6


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def settings(**fields: object) -> Settings:
    free: dict[str, object] = {"port": any_free(), "dashboard_port": any_free()}
    return Settings(**{**free, **fields})  # type: ignore[arg-type]


def test_a_free_machine_passes(tmp_path: Path) -> None:
    check(settings(), tmp_path)


@needs_ipv6
def test_a_host_may_be_of_ipv6(tmp_path: Path) -> None:
    check(settings(host="::1"), tmp_path)
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as server:
        port = server.getsockname()[1]
        with pytest.raises(PortTaken):
            check(settings(host="::1", port=port), tmp_path)


@pytest.mark.parametrize("host", ["localhost2.invalid", "203.0.113.9", "fe80::dead"])
def test_a_mistyped_host_is_named_and_not_its_port(tmp_path: Path, host: str) -> None:
    with pytest.raises(AddressUnusable, match=rf"listen on '{host}'. Set RAYLORA_HOST"):
        check(settings(host=host), tmp_path)


@pytest.mark.parametrize("field", ["port", "dashboard_port"])
def test_a_port_in_use_is_named_with_its_variable(tmp_path: Path, taken: int, field: str) -> None:
    with pytest.raises(PortTaken, match=f"{taken} is in use.*RAYLORA_{field.upper()} "):
        check(settings(**{field: taken}), tmp_path)


def test_in_a_cluster_that_runs_the_port_may_be_open_already(tmp_path: Path, taken: int) -> None:
    check(settings(port=taken, ray_address="10.0.0.1:6379"), tmp_path)


def test_a_port_that_only_root_may_open_is_not_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve_app.stack.checks.obstacle_to", lambda host, port: Obstacle.FORBIDDEN)
    with pytest.raises(PortForbidden, match=r"may not open port 80\. Set RAYLORA_PORT"):
        check_port(80, "RAYLORA_PORT", "127.0.0.1", "RAYLORA_HOST")


def test_a_model_without_a_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelMissing, match="'mine'"):
        check(settings(models={"mine": str(tmp_path)}, default_model="mine"), tmp_path)
