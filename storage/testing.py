"""An object store in memory, for tests of what is built on objects. Faults are scripted."""

from __future__ import annotations

import asyncio
import hashlib
import urllib.parse
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from storage.breaker import BreakerMode, BreakerSnapshot, CircuitBreaker
from storage.counters import Counts, Tally
from storage.errors import IntegrityError, ObjectNotFound, StorageError
from storage.keys import check_key, check_prefix
from storage.objects import (
    PRESIGN_EXPIRES_S_MAX,
    Capabilities,
    ObjectInfo,
    PendingUpload,
    PutItem,
    PutOutcome,
    StorageHealth,
)


@dataclass(frozen=True)
class _Stored:
    data: bytes
    info: ObjectInfo


class InMemoryStore:
    """Implements `ObjectStore` and `StoreMaintenance`, with the same checks and errors as the real one.

    `calls` counts operations by name. `uploads` are multipart uploads that somebody left behind. `fail` scripts the
    next results of one operation, `break_down` makes all of them fail until `recover`, and `hold` keeps one waiting.
    """

    def __init__(self, *, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self.calls: Counter[str] = Counter()
        self.uploads: list[PendingUpload] = []
        self._breaker = CircuitBreaker(5, 60.0, 60.0)
        self._now = now
        self._objects: dict[str, _Stored] = {}
        self._scripted: defaultdict[str, deque[StorageError]] = defaultdict(deque)
        self._broken: StorageError | None = None
        self._held: dict[str, asyncio.Event] = {}

    def fail(self, operation: str, *errors: StorageError) -> None:
        """The next calls of `operation` raise these, one each."""
        self._scripted[operation].extend(errors)

    def break_down(self, error: StorageError) -> None:
        self._broken = error

    def recover(self) -> None:
        self._broken = None

    def hold(self, operation: str) -> asyncio.Event:
        """Calls of `operation` wait until the event is set."""
        return self._held.setdefault(operation, asyncio.Event())

    def keys(self) -> Sequence[str]:
        """Of everything stored, in order."""
        return sorted(self._objects, key=str.encode)

    async def put(self, key: str, data: bytes, *, content_type: str | None = None) -> ObjectInfo:
        await self._enter("put", key)
        return self._store(key, bytes(data), content_type)

    async def put_many(self, items: Sequence[PutItem]) -> list[PutOutcome]:
        outcomes = []
        for item in items:
            try:
                info = await self.put(item.key, item.data, content_type=item.content_type)
            except StorageError as error:
                outcomes.append(PutOutcome(item.key, error=error))
            else:
                outcomes.append(PutOutcome(item.key, info=info))
        return outcomes

    async def get(self, key: str, *, expected_sha256: str | None = None) -> bytes:
        await self._enter("get", key)
        stored = self._find(key)
        if expected_sha256 is not None and expected_sha256 != stored.info.sha256:
            raise IntegrityError(key, expected_sha256, str(stored.info.sha256))
        return stored.data

    async def head(self, key: str) -> ObjectInfo:
        await self._enter("head", key)
        return self._find(key).info

    async def exists(self, key: str) -> bool:
        await self._enter("exists", key)
        return key in self._objects

    async def delete(self, key: str) -> None:
        await self._enter("delete", key)
        self._objects.pop(key, None)

    async def delete_many(self, keys: Sequence[str]) -> int:
        await self._enter("delete_many", *keys)
        for key in keys:
            self._objects.pop(key, None)
        return len(keys)

    async def copy(self, source: str, target: str) -> ObjectInfo:
        await self._enter("copy", source, target)
        original = self._find(source)
        return self._store(target, original.data, original.info.content_type)

    async def upload_file(self, path: Path, key: str, *, content_type: str | None = None) -> ObjectInfo:
        await self._enter("upload_file", key)
        return self._store(key, await asyncio.to_thread(path.read_bytes), content_type)

    async def download_file(self, key: str, path: Path, *, expected_sha256: str | None = None) -> ObjectInfo:
        await self._enter("download_file", key)
        stored = self._find(key)
        if expected_sha256 is not None and expected_sha256 != stored.info.sha256:
            raise IntegrityError(key, expected_sha256, str(stored.info.sha256))
        await asyncio.to_thread(path.write_bytes, stored.data)
        return stored.info

    async def presign_get(self, key: str, *, expires_s: int = 3600, filename: str | None = None) -> str:
        await self._enter("presign_get", key)
        return _url("GET", key, expires_s, filename)

    async def presign_put(self, key: str, *, expires_s: int = 3600, content_type: str | None = None) -> str:
        await self._enter("presign_put", key)
        return _url("PUT", key, expires_s, content_type)

    async def health(self) -> StorageHealth:
        try:
            await self._enter("health")
        except StorageError as error:
            return self._health(ok=False, detail=error.code)
        return self._health(ok=True, latency_ms=0.0)

    async def ensure_bucket(self) -> None:
        await self._enter("ensure_bucket")

    async def list_uploads(self, prefix: str) -> list[PendingUpload]:
        check_prefix(prefix)
        await self._enter("list_uploads")
        return [upload for upload in self.uploads if upload.key.startswith(prefix)]

    async def abort_upload(self, key: str, upload_id: str) -> None:
        await self._enter("abort_upload", key)
        self.uploads = [upload for upload in self.uploads if (upload.key, upload.upload_id) != (key, upload_id)]

    async def capabilities(self) -> Capabilities:
        await self._enter("capabilities")
        return Capabilities(False, True, True, True, False, False, False, True)

    async def set_breaker(self, mode: BreakerMode) -> BreakerSnapshot:
        """Kept, and shown by `health`. It holds no call back: nothing in memory is ever unreachable."""
        self._breaker.force(mode)
        return self._breaker.snapshot()

    async def counts(self) -> Counts:
        return Tally().counts()

    async def list(self, prefix: str, *, start_after: str | None = None, limit: int | None = None) -> list[ObjectInfo]:
        check_prefix(prefix)
        await self._enter("list")
        after = (start_after or "").encode()
        found = [key for key in self.keys() if key.startswith(prefix) and key.encode() > after]
        listed = (self._objects[key].info for key in found[:limit])
        return [ObjectInfo(info.key, info.size_bytes, modified_at=info.modified_at) for info in listed]

    async def _enter(self, operation: str, *keys: str) -> None:
        for key in keys:
            check_key(key)
        self.calls[operation] += 1
        if operation in self._held:
            await self._held[operation].wait()
        if self._scripted[operation]:
            raise self._scripted[operation].popleft()
        if self._broken is not None:
            raise self._broken

    def _health(self, *, ok: bool, latency_ms: float | None = None, detail: str | None = None) -> StorageHealth:
        breaker = self._breaker.snapshot()
        return StorageHealth(
            ok, breaker.state.value, "memory", latency_ms, detail=detail, breaker_mode=breaker.mode.value
        )

    def _find(self, key: str) -> _Stored:
        if key not in self._objects:
            raise ObjectNotFound(key)
        return self._objects[key]

    def _store(self, key: str, data: bytes, content_type: str | None) -> ObjectInfo:
        info = ObjectInfo(key, len(data), hashlib.sha256(data).hexdigest(), self._now(), content_type)
        self._objects[key] = _Stored(data, info)
        return info


def _url(method: str, key: str, expires_s: int, extra: str | None) -> str:
    """Recognisable, and of a host that never resolves."""
    if not 1 <= expires_s <= PRESIGN_EXPIRES_S_MAX:
        raise ValueError(f"expires_s must be between 1 and {PRESIGN_EXPIRES_S_MAX}")
    query = urllib.parse.urlencode({"method": method, "expires_s": expires_s, "extra": extra or ""})
    return f"http://memory.invalid/{urllib.parse.quote(key)}?{query}"
