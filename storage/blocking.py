"""Objects for code without an event loop, such as training workers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from storage.loop_thread import LoopThread
from storage.objects import ObjectInfo, ObjectStore, PutItem, PutOutcome, StorageHealth


class BlockingStorage:
    """The methods of an `ObjectStore` for code without an event loop. Picklable when its store is."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._thread = LoopThread("blocking-storage")

    def __reduce__(self) -> tuple[Any, ...]:
        return BlockingStorage, (self._store,)

    def close(self) -> None:
        """End the thread. No method may be called afterwards."""
        self._thread.stop()

    def put(self, key: str, data: bytes, *, content_type: str | None = None) -> ObjectInfo:
        return self._thread.run_blocking(self._store.put(key, data, content_type=content_type))

    def put_many(self, items: Sequence[PutItem]) -> list[PutOutcome]:
        return self._thread.run_blocking(self._store.put_many(items))

    def get(self, key: str, *, expected_sha256: str | None = None) -> bytes:
        return self._thread.run_blocking(self._store.get(key, expected_sha256=expected_sha256))

    def head(self, key: str) -> ObjectInfo:
        return self._thread.run_blocking(self._store.head(key))

    def exists(self, key: str) -> bool:
        return self._thread.run_blocking(self._store.exists(key))

    def delete(self, key: str) -> None:
        self._thread.run_blocking(self._store.delete(key))

    def delete_many(self, keys: Sequence[str]) -> int:
        return self._thread.run_blocking(self._store.delete_many(keys))

    def copy(self, source: str, target: str) -> ObjectInfo:
        return self._thread.run_blocking(self._store.copy(source, target))

    def upload_file(self, path: Path, key: str, *, content_type: str | None = None) -> ObjectInfo:
        return self._thread.run_blocking(self._store.upload_file(path, key, content_type=content_type))

    def download_file(self, key: str, path: Path, *, expected_sha256: str | None = None) -> ObjectInfo:
        return self._thread.run_blocking(self._store.download_file(key, path, expected_sha256=expected_sha256))

    def presign_get(self, key: str, *, expires_s: int = 3600, filename: str | None = None) -> str:
        return self._thread.run_blocking(self._store.presign_get(key, expires_s=expires_s, filename=filename))

    def presign_put(self, key: str, *, expires_s: int = 3600, content_type: str | None = None) -> str:
        return self._thread.run_blocking(self._store.presign_put(key, expires_s=expires_s, content_type=content_type))

    def health(self) -> StorageHealth:
        return self._thread.run_blocking(self._store.health())

    def ensure_bucket(self) -> None:
        self._thread.run_blocking(self._store.ensure_bucket())

    def list(self, prefix: str, *, start_after: str | None = None, limit: int | None = None) -> list[ObjectInfo]:
        return self._thread.run_blocking(self._store.list(prefix, start_after=start_after, limit=limit))
