"""Ports are checked before anything starts, and the storage port survives a restart."""

import socket
from pathlib import Path

import pytest

from serve_app.stack import ports
from serve_app.stack.ports import any_free, is_free, remembered


def test_a_port_with_a_listener_is_not_free() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        assert not is_free(server.getsockname()[1])
    assert is_free(any_free())


def test_a_port_for_later_is_none_of_the_systems_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bounds = tmp_path / "bounds"
    bounds.write_text(f"{ports.FIRST_OWN_PORT + 100}\t60999\n")
    monkeypatch.setattr(ports, "EPHEMERAL_BOUNDS", str(bounds))
    monkeypatch.setattr(ports, "_given", set())
    given = [any_free(room=4) for _ in range(8)]
    assert all(ports.FIRST_OWN_PORT <= port < ports.FIRST_OWN_PORT + 96 for port in given)
    ranges = [set(range(port, port + 5)) for port in given]
    assert len(set.union(*ranges)) == 8 * 5


def test_where_the_system_gives_away_all_ports_one_is_found_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bounds = tmp_path / "bounds"
    bounds.write_text("1024\t65535\n")
    monkeypatch.setattr(ports, "EPHEMERAL_BOUNDS", str(bounds))
    assert is_free(any_free(room=4))


def test_that_no_port_is_free_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "is_free", lambda port: False)
    with pytest.raises(OSError, match="no free port"):
        any_free()


def test_the_port_stays_the_same_over_restarts(tmp_path: Path) -> None:
    assert remembered(tmp_path / "port") == remembered(tmp_path / "port")


def test_a_remembered_port_that_is_taken_now_is_replaced(tmp_path: Path) -> None:
    file = tmp_path / "port"
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        taken = server.getsockname()[1]
        file.write_text(f"{taken}\n")
        assert remembered(file) != taken


def test_a_damaged_port_file_is_replaced(tmp_path: Path) -> None:
    file = tmp_path / "port"
    file.write_text("not a port")
    assert remembered(file) == int(file.read_text())
