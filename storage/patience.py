"""Waiting while the object storage is away, for work that costs more than the wait.

One call ends within its deadline, which is short: a training of hours must not be lost with one call. What happens to
be refused, or fails while the storage answers other calls, is not waited for.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TypeVar

from storage.errors import StorageError, StorageUnavailable
from storage.objects import ObjectInfo, ObjectStore, PutItem, PutOutcome, StorageHealth

T = TypeVar("T")

logger = logging.getLogger(__name__)

# An open breaker is asked at no cost, and may be closed earlier than it said.
WAIT_S_MIN, WAIT_S_MAX = 1.0, 5.0
# So that a wait ends soon after it has lost its purpose.
NAP_S = 1.0
# A server that was started anew may answer right after it failed a call.
FAILURES_MAX_WHILE_ANSWERING = 2


class Patience:
    """What to do about the failures of one call."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._failures_while_answering = 0

    async def wait_s(self, error: StorageError) -> float:
        """How long to wait before the call is made again. Raises `error` where that would not help."""
        if error.retry_after_s is None:
            raise error
        away_s: float | None = error.retry_after_s
        if not isinstance(error, StorageUnavailable):
            health = await self._store.health()
            away_s = health.retry_after_s
            if health.ok:
                self._failures_while_answering += 1
                if self._failures_while_answering == FAILURES_MAX_WHILE_ANSWERING:
                    raise error
        return min(max(away_s or 0.0, WAIT_S_MIN), WAIT_S_MAX)


def _never() -> bool:
    return False


def _untold(is_waiting: bool) -> None:
    """Nobody wants to know."""


class PatientStore:
    """Implements `ObjectStore` over another one, whose calls it makes again until the storage is back.

    `should_stop` is asked while it waits: where it says yes, the call fails as it did last. `tell` hears when a call
    begins to wait, and when it goes on or fails. Picklable where its parts are.
    """

    def __init__(
        self,
        store: ObjectStore,
        *,
        should_stop: Callable[[], bool] = _never,
        tell: Callable[[bool], None] = _untold,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._store = store
        self._should_stop = should_stop
        self._tell = tell
        self._sleep = sleep

    async def put(self, key: str, data: bytes, *, content_type: str | None = None) -> ObjectInfo:
        return await self._call(lambda: self._store.put(key, data, content_type=content_type))

    async def put_many(self, items: Sequence[PutItem]) -> list[PutOutcome]:
        """Those that fail are sent again by themselves."""
        outcomes: dict[int, PutOutcome] = {}
        missing = list(range(len(items)))

        async def put_missing() -> None:
            nonlocal missing
            sent = await self._store.put_many([items[index] for index in missing])
            outcomes.update(zip(missing, sent, strict=True))
            failed = [(index, one.error) for index, one in zip(missing, sent, strict=True) if one.error is not None]
            again = [(index, error) for index, error in failed if error.retry_after_s is not None]
            missing = [index for index, _ in again]
            if again:
                raise again[0][1]

        try:
            await self._call(put_missing)
        except StorageError as error:
            logger.info("%d of %d objects were not stored", len(missing), len(items))
            for index in missing:
                outcomes.setdefault(index, PutOutcome(items[index].key, error=error))
        return [outcomes[index] for index in range(len(items))]

    async def get(self, key: str, *, expected_sha256: str | None = None) -> bytes:
        return await self._call(lambda: self._store.get(key, expected_sha256=expected_sha256))

    async def head(self, key: str) -> ObjectInfo:
        return await self._call(lambda: self._store.head(key))

    async def exists(self, key: str) -> bool:
        return await self._call(lambda: self._store.exists(key))

    async def delete(self, key: str) -> None:
        await self._call(lambda: self._store.delete(key))

    async def delete_many(self, keys: Sequence[str]) -> int:
        return await self._call(lambda: self._store.delete_many(keys))

    async def copy(self, source: str, target: str) -> ObjectInfo:
        return await self._call(lambda: self._store.copy(source, target))

    async def upload_file(self, path: Path, key: str, *, content_type: str | None = None) -> ObjectInfo:
        return await self._call(lambda: self._store.upload_file(path, key, content_type=content_type))

    async def download_file(self, key: str, path: Path, *, expected_sha256: str | None = None) -> ObjectInfo:
        return await self._call(lambda: self._store.download_file(key, path, expected_sha256=expected_sha256))

    async def presign_get(self, key: str, *, expires_s: int = 3600, filename: str | None = None) -> str:
        return await self._call(lambda: self._store.presign_get(key, expires_s=expires_s, filename=filename))

    async def presign_put(self, key: str, *, expires_s: int = 3600, content_type: str | None = None) -> str:
        return await self._call(lambda: self._store.presign_put(key, expires_s=expires_s, content_type=content_type))

    async def health(self) -> StorageHealth:
        """As it is now."""
        return await self._store.health()

    async def ensure_bucket(self) -> None:
        await self._call(self._store.ensure_bucket)

    async def list(self, prefix: str, *, start_after: str | None = None, limit: int | None = None) -> list[ObjectInfo]:
        return await self._call(lambda: self._store.list(prefix, start_after=start_after, limit=limit))

    async def _call(self, call: Callable[[], Awaitable[T]]) -> T:
        patience = Patience(self._store)
        is_waiting = False
        try:
            while True:
                try:
                    return await call()
                except StorageError as error:
                    wait_s = await patience.wait_s(error)
                    if not is_waiting:
                        is_waiting = True
                        logger.warning("waiting for the object storage (%s)", error.code)
                        self._tell(True)
                    if await self._is_stopped_within(wait_s):
                        raise
        finally:
            if is_waiting:
                self._tell(False)

    async def _is_stopped_within(self, wait_s: float) -> bool:
        while wait_s > 0 and not self._should_stop():
            await self._sleep(min(NAP_S, wait_s))
            wait_s -= NAP_S
        return self._should_stop()
