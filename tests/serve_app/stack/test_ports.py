"""Ports are checked before anything starts, and the storage port survives a restart."""

import socket
from pathlib import Path

from serve_app.stack.ports import any_free, is_free, remembered


def test_a_port_with_a_listener_is_not_free() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        assert not is_free(server.getsockname()[1])
    assert is_free(any_free())


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
