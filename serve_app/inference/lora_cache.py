"""Adapters on this replica's disk: fetched by key, verified, shared, bounded in bytes."""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from serve_app.inference.plan import ResolvedLora
from storage.objects import ObjectStore
from storage.ray_counters import note_cleanup_failure

NAME_BYTES = 20


class LoraCache:
    """One download per adapter however many ask for it at once; the least recently used go first.

    An adapter that is borrowed is never removed, so the folder may exceed `bytes_max` while many are in use.
    """

    def __init__(self, store: ObjectStore, folder: Path, *, bytes_max: int) -> None:
        self._store = store
        self._folder = folder
        self._bytes_max = bytes_max
        self._downloads: dict[str, asyncio.Task[Path]] = {}
        self._sizes: OrderedDict[str, int] = OrderedDict()
        self._borrowed: Counter[str] = Counter()

    @asynccontextmanager
    async def borrow(self, loras: Sequence[ResolvedLora]) -> AsyncIterator[list[Path]]:
        """The adapters' files, in the order of `loras`, kept until the block ends. Raises StorageError."""
        async with AsyncExitStack() as stack:
            yield [await stack.enter_async_context(self._borrow_one(lora)) for lora in loras]

    @asynccontextmanager
    async def _borrow_one(self, lora: ResolvedLora) -> AsyncIterator[Path]:
        name = file_name(lora)
        self._borrowed[name] += 1
        try:
            yield await self._file(name, lora)
        finally:
            self._borrowed[name] -= 1
            self._evict()

    async def _file(self, name: str, lora: ResolvedLora) -> Path:
        if name in self._sizes:
            self._sizes.move_to_end(name)
            return self._folder / name
        task = self._downloads.get(name)
        if task is None:
            task = asyncio.create_task(self._download(name, lora))
            self._downloads[name] = task
            task.add_done_callback(lambda _: self._downloads.pop(name, None))
        # Shielded: one waiter's cancellation must not end the download for the others.
        return await asyncio.shield(task)

    async def _download(self, name: str, lora: ResolvedLora) -> Path:
        path = self._folder / name
        await asyncio.to_thread(self._folder.mkdir, parents=True, exist_ok=True)
        info = await self._store.download_file(lora.key, path, expected_sha256=lora.sha256)
        self._sizes[name] = info.size_bytes
        return path

    def _evict(self) -> None:
        total_bytes = sum(self._sizes.values())
        for name in list(self._sizes):
            if total_bytes <= self._bytes_max:
                return
            if self._borrowed[name] == 0:
                total_bytes -= self._sizes.pop(name)
                del self._borrowed[name]
                self._unlink(self._folder / name)

    def _unlink(self, path: Path) -> None:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            note_cleanup_failure("cached_adapter", type(error).__name__)


def file_name(lora: ResolvedLora) -> str:
    """Stored objects never change under a key, so the key names the content even where no digest is known."""
    digest = hashlib.sha256(f"{lora.key}\0{lora.sha256 or ''}".encode()).hexdigest()
    return f"{digest[: NAME_BYTES * 2]}.safetensors"
