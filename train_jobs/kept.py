"""What depends on its inputs alone, kept by their hash: on this node's disk and in the object store, for every run.

An object is never changed once it is whole, so writers need not wait for each other. Each carries its own digest; a
damaged one counts as missing, is logged, and is written anew by whoever computes it again. A disk that is full, cannot
be written, or is pruned by another training at the same time costs no more than that; it is logged once, and counted.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import json
import logging
import os
import re
import stat
import tempfile
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar

from storage.errors import ObjectNotFound
from storage.keys import Keys
from storage.objects import ObjectStore, PutItem

logger = logging.getLogger(__name__)
T = TypeVar("T")

MARK = b"raylora1"
DIGEST_BYTES = 32
CALLS_MAX = 16
FOLDER_BYTES_MAX = 20 * 2**30


def name_of(*inputs: Any) -> str:
    """The sha256 of inputs that are plain JSON values."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def digest_of_file(path: Path) -> str:
    """Its sha256. A file of the Hugging Face cache is a link to one that is named by it, which then is not read."""
    target = path.resolve()
    if path.is_symlink() and re.fullmatch(r"[0-9a-f]{64}", target.name):
        return target.name
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of_files(folder: Path, patterns: Sequence[str], digest_of: Callable[[Path], str] = digest_of_file) -> str:
    """Of names and contents of the files that match."""
    files = sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
    return name_of([[path.relative_to(folder).as_posix(), digest_of(path)] for path in files])


class Runner(Protocol):
    """Runs a coroutine to its end from code without an event loop: `storage.loop_thread.LoopThread` is one."""

    def run_blocking(self, work: Coroutine[Any, Any, T]) -> T: ...


class Kept:
    """One tenant's. Without `folder` only the object store is used. Methods block; `fetch` raises StorageError."""

    def __init__(
        self, store: ObjectStore, runner: Runner, keys: Keys, folder: Path | None, *,
        folder_bytes_max: int = FOLDER_BYTES_MAX,
    ) -> None:  # fmt: skip
        self._store = store
        self._runner = runner
        self._keys = keys
        self._folder = None if folder is None else folder / keys.tenant
        self._folder_bytes_max = folder_bytes_max
        self.disk_failures = 0

    def fetch(self, kind: str, names: Sequence[str]) -> dict[str, bytes]:
        """Those that are there and whole, by name."""
        found: dict[str, bytes] = {}
        for name in dict.fromkeys(names):
            data = self._read(kind, name)
            if data is not None:
                found[name] = data
        missing = [name for name in dict.fromkeys(names) if name not in found]
        stored = self._runner.run_blocking(self._get_all(kind, missing)) if missing else {}
        for name, sealed in stored.items():
            data = _opened(sealed)
            if data is None:
                logger.warning("a kept object of the kind %s is damaged and will be made again", kind)
                continue
            found[name] = data
            self._write(kind, name, sealed)
        return found

    def keep(self, kind: str, items: Mapping[str, bytes]) -> None:
        """Store them. One that cannot be stored is logged: it will be made again."""
        if not items:
            return
        sealed = {name: MARK + hashlib.sha256(data).digest() + data for name, data in items.items()}
        for name, data in sealed.items():
            self._write(kind, name, data)
        puts = [PutItem(self._keys.kept(kind, name), data) for name, data in sealed.items()]
        for outcome in self._runner.run_blocking(self._store.put_many(puts)):
            if outcome.error is not None:
                logger.warning("an object of the kind %s could not be kept: %s", kind, outcome.error.code)

    def prune(self) -> None:
        """Delete the files used longest ago until those left are within the bound. The object store is not touched."""
        if self._folder is None or not self._folder.is_dir():
            return
        files: list[tuple[Path, os.stat_result]] = []
        for path in self._folder.rglob("*"):
            # Another worker of this node prunes too, or has just written.
            with self._noted("looked at"), suppress(FileNotFoundError):
                status = path.stat()
                if stat.S_ISREG(status.st_mode):
                    files.append((path, status))
        left = sum(status.st_size for _, status in files)
        for path, status in sorted(files, key=lambda file: file[1].st_mtime):
            if left <= self._folder_bytes_max:
                return
            with self._noted("deleted"):
                path.unlink(missing_ok=True)
                left -= status.st_size

    async def _get_all(self, kind: str, names: Sequence[str]) -> dict[str, bytes]:
        calls = asyncio.Semaphore(CALLS_MAX)

        async def get(name: str) -> tuple[str, bytes] | None:
            async with calls:
                try:
                    return name, await self._store.get(self._keys.kept(kind, name))
                except ObjectNotFound:
                    return None

        return dict(item for item in await asyncio.gather(*(get(name) for name in names)) if item is not None)

    def _path(self, kind: str, name: str) -> Path | None:
        return None if self._folder is None else self._folder / kind / name[:2] / name

    def _read(self, kind: str, name: str) -> bytes | None:
        path = self._path(kind, name)
        data: bytes | None = None
        # Another training may prune it at any moment.
        with self._noted("read"), suppress(FileNotFoundError):
            if path is None:
                return None
            data = _opened(path.read_bytes())
            if data is None:
                logger.warning("a kept file of the kind %s is damaged and will be made again", kind)
            else:
                os.utime(path)
        return data

    def _write(self, kind: str, name: str, sealed: bytes) -> None:
        path = self._path(kind, name)
        if path is None:
            return
        with self._noted("written"):
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            handle, temporary = tempfile.mkstemp(dir=path.parent)
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(sealed)
                os.replace(temporary, path)
            except BaseException:
                Path(temporary).unlink(missing_ok=True)
                raise

    @contextmanager
    def _noted(self, done: str) -> Iterator[None]:
        """What the disk cannot do is no reason to stop."""
        try:
            yield
        except OSError as error:
            self.disk_failures += 1
            if self.disk_failures == 1:
                reason = errno.errorcode.get(error.errno or 0, "unknown")
                logger.warning("a kept file cannot be %s on this disk (%s); others are not told of", done, reason)


def _opened(sealed: bytes) -> bytes | None:
    """The data, or None where it is not what was kept."""
    head = len(MARK) + DIGEST_BYTES
    data = sealed[head:]
    is_whole = sealed[:head] == MARK + hashlib.sha256(data).digest()
    return data if is_whole else None
