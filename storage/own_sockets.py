"""Unix sockets between processes of one user on one node: the folder, how one appears, what killed servers leave."""

from __future__ import annotations

import logging
import os
import socket
import stat
from pathlib import Path

logger = logging.getLogger(__name__)


def is_own(folder: Path) -> bool:
    """Whether it is a folder, not a link to one, that only this user can enter. Raises FileNotFoundError."""
    found = folder.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077


def listen_at(path: Path, backlog: int) -> socket.socket:
    """A socket that does not block; its name appears once it listens, and nobody takes it for an abandoned one before.

    Raises OSError.
    """
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    made.setblocking(False)
    unready = path.with_suffix(".new")
    try:
        unready.unlink(missing_ok=True)
        made.bind(str(unready))
        unready.chmod(0o600)
        made.listen(backlog)
        unready.rename(path)
    except BaseException:
        made.close()
        raise
    return made


def remove_abandoned(folder: Path, suffix: str) -> None:
    """Those to which nobody listens. Does not block."""
    for path in folder.glob("*" + suffix):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)
            try:
                probe.connect(str(path))
            except ConnectionRefusedError:
                path.unlink(missing_ok=True)
            except OSError as error:
                logger.warning("a socket was left as it is", extra={"path": str(path), "errno": error.errno})
