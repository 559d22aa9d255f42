"""Which folders are this user's alone, and which sockets are cleared away."""

import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.own_sockets import is_own, listen_at, remove_abandoned


@pytest.fixture
def folder() -> Iterator[Path]:
    """With a short path: a socket's is limited to about 100 bytes."""
    with tempfile.TemporaryDirectory(prefix="rl", dir="/tmp") as name:
        yield Path(name)


@pytest.mark.parametrize(("mode", "own"), [(0o700, True), (0o500, True), (0o750, False), (0o701, False)])
def test_a_folder_is_own_where_nobody_else_can_enter(folder: Path, mode: int, own: bool) -> None:
    (folder / "d").mkdir()
    (folder / "d").chmod(mode)
    assert is_own(folder / "d") is own


def test_a_link_to_an_own_folder_is_not_one(folder: Path) -> None:
    (folder / "link").symlink_to(folder)
    assert not is_own(folder / "link")


def test_a_socket_is_the_users_alone_and_nothing_else_is_left(folder: Path) -> None:
    with listen_at(folder / "a.sock", 1):
        assert (folder / "a.sock").stat().st_mode & 0o077 == 0
        assert [path.name for path in folder.iterdir()] == ["a.sock"]
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(folder / "a.sock"))


def test_only_sockets_of_that_kind_to_which_nobody_listens_are_removed(folder: Path) -> None:
    for name in ("dead.sock", "dead.other"):
        listen_at(folder / name, 1).close()
    with listen_at(folder / "alive.sock", 1), listen_at(folder / "busy.sock", 0):
        with socket.socket(socket.AF_UNIX) as waiting:
            waiting.connect(str(folder / "busy.sock"))
            remove_abandoned(folder, ".sock")
        assert sorted(path.name for path in folder.iterdir()) == ["alive.sock", "busy.sock", "dead.other"]
