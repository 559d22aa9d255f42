"""A folder of one process on a disk that others share. What processes before it have left is removed."""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
from pathlib import Path
from typing import Any

from storage.ray_counters import note_cleanup_failure

LOCK = ".lock"


def own_folder(parent: Path) -> Path:
    """A new folder in `parent`, held until this process ends. Those that no process holds any more are removed.

    Raises OSError where `parent` cannot be written.
    """
    parent.mkdir(parents=True, exist_ok=True)
    starting = _lock(parent, wait=True)  # nobody takes a folder for left that is about to be held
    try:
        folder = parent / secrets.token_hex(4)
        folder.mkdir()
        _lock(folder)
        for other in parent.iterdir():
            if other.is_dir() and other != folder:
                _remove_if_left(other)
    finally:
        os.close(starting)
    return folder


def _remove_if_left(folder: Path) -> None:
    try:
        held = _lock(folder)
    except BlockingIOError:
        return
    except OSError as error:
        note_cleanup_failure("cached_adapter", type(error).__name__)
        return
    try:
        shutil.rmtree(folder, onerror=_note)
    finally:
        os.close(held)


def _note(_function: Any, _path: str, error: Any) -> None:
    note_cleanup_failure("cached_adapter", error[0].__name__)


def _lock(folder: Path, *, wait: bool = False) -> int:
    """An open file that holds the folder. Raises BlockingIOError where another has it."""
    file = os.open(folder / LOCK, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BaseException:
        os.close(file)
        raise
    return file
