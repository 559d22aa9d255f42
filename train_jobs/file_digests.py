"""SHA-256 of large files, remembered on this node's disk, so that a model is read through once and not in every run."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from pathlib import Path

from train_jobs.kept import digest_of_file, name_of

logger = logging.getLogger(__name__)

FOLDER = ".file-digests"
"""No tenant has this name: theirs begin with a letter or a digit."""


class FileDigests:
    """Remembers in a folder below `kept_folder`; None: nowhere. Files are known again by path, size and times, to the
    nanosecond: a copy in a file's place has another time of change even where it took over that of its content.

    What the disk cannot remember is computed again, and logged.
    """

    def __init__(self, kept_folder: Path | None) -> None:
        self._folder = None if kept_folder is None else kept_folder / FOLDER

    def of(self, path: Path) -> str:
        """In hex. Raises OSError for a file that cannot be read."""
        if self._folder is None:
            return digest_of_file(path)
        status = path.stat()
        stamp: list[str | int] = [str(path.resolve()), status.st_size, status.st_mtime_ns, status.st_ctime_ns]
        note = self._folder / name_of(*stamp[:1])
        known = _read(note)
        if known is not None and known[0] == stamp:
            return known[1]
        digest = digest_of_file(path)
        self._remember(note, stamp, digest)
        return digest

    def _remember(self, note: Path, stamp: list[str | int], digest: str) -> None:
        try:
            note.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            handle, temporary = tempfile.mkstemp(dir=note.parent)
            try:
                with os.fdopen(handle, "w") as file:
                    json.dump([stamp, digest], file)
                os.replace(temporary, note)
            except BaseException:
                Path(temporary).unlink(missing_ok=True)
                raise
        except OSError as error:
            logger.warning("the hash of a model's file cannot be remembered on this disk (%s)", type(error).__name__)


def _read(note: Path) -> tuple[list[str | int], str] | None:
    """What was remembered; None where nothing was, or nothing that can be read."""
    try:
        stamp, digest = json.loads(note.read_text())
        return list(stamp), str(digest)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        logger.warning("a remembered hash of a model's file cannot be read (%s)", type(error).__name__)
        return None
