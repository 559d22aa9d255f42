"""The interface to objects that everything else programs against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol, runtime_checkable

from storage.breaker import BreakerMode, BreakerSnapshot
from storage.counters import Counts
from storage.errors import StorageError

PRESIGN_EXPIRES_S_MAX = 7 * 24 * 3600


@dataclass(frozen=True)
class ObjectInfo:
    """What is known of a stored object.

    `sha256` (hex) is None where nobody computed it: in listings, and on backends that forget metadata.
    """

    key: str
    size_bytes: int
    sha256: str | None = None
    modified_at: datetime | None = None
    content_type: str | None = None


@dataclass(frozen=True)
class PutItem:
    key: str
    data: bytes
    content_type: str | None = None


@dataclass(frozen=True)
class PutOutcome:
    """Exactly one of `info` and `error` is set."""

    key: str
    info: ObjectInfo | None = None
    error: StorageError | None = None

    def __post_init__(self) -> None:
        if (self.info is None) == (self.error is None):
            raise ValueError("an object was stored, or there is a reason why not")


@dataclass(frozen=True)
class StorageHealth:
    """`breaker` is "closed", "open" or "half_open". `detail` is an error code of `storage.errors`, never a text.

    `breaker_mode` is "automatic", or "forced_open" or "forced_closed" where an operator decides.
    """

    ok: bool
    breaker: str
    backend: str
    latency_ms: float | None = None
    detail: str | None = None
    retry_after_s: float | None = None
    breaker_mode: str = "automatic"


@dataclass(frozen=True)
class PendingUpload:
    """A multipart upload that nobody has completed or aborted yet."""

    key: str
    upload_id: str
    started_at: datetime


@dataclass(frozen=True)
class Capabilities:
    """What a server can do. `tags`, `lifecycle`, `presigned_post` and `keeps_metadata` (over a restart) are known of
    its kind, the others were tried out."""

    conditional_writes: bool
    ranged_reads: bool
    multipart_listing: bool
    answers_with_etag: bool
    tags: bool
    lifecycle: bool
    presigned_post: bool
    keeps_metadata: bool


@runtime_checkable
class ObjectStore(Protocol):
    """Objects by key. Every method but `health` raises `storage.errors.StorageError` and nothing else of its own.

    Cancelling a call leaves no half-written object under its key; whether the write happened is then unknown.
    """

    async def put(self, key: str, data: bytes, *, content_type: str | None = None) -> ObjectInfo:
        """Store `data` and verify what was stored. Returns with `sha256` set."""
        ...

    async def put_many(self, items: Sequence[PutItem]) -> list[PutOutcome]:
        """Store all items concurrently, within bounds. One outcome for each, in their order; does not raise."""
        ...

    async def get(self, key: str, *, expected_sha256: str | None = None) -> bytes:
        """Raises ObjectNotFound; IntegrityError when the bytes do not have `expected_sha256`."""
        ...

    async def head(self, key: str) -> ObjectInfo:
        """Raises ObjectNotFound."""
        ...

    async def exists(self, key: str) -> bool: ...

    async def delete(self, key: str) -> None:
        """A missing object is fine."""
        ...

    async def delete_many(self, keys: Sequence[str]) -> int:
        """Number of keys that are gone now, missing ones included."""
        ...

    async def list(self, prefix: str, *, start_after: str | None = None, limit: int | None = None) -> list[ObjectInfo]:
        """All objects below `prefix`, which ends with "/", in key order; pages are followed up to `limit` objects."""
        ...

    async def copy(self, source: str, target: str) -> ObjectInfo:
        """Copy within the bucket, on the server. Raises ObjectNotFound for `source`."""
        ...

    async def upload_file(self, path: Path, key: str, *, content_type: str | None = None) -> ObjectInfo:
        """Stream a file into the store and verify it. Raises FileNotFoundError for `path`."""
        ...

    async def download_file(self, key: str, path: Path, *, expected_sha256: str | None = None) -> ObjectInfo:
        """Stream an object into a file, which appears complete or not at all. Returns with `sha256` set."""
        ...

    async def presign_get(self, key: str, *, expires_s: int = 3600, filename: str | None = None) -> str:
        """A URL for one GET. `filename` is what a browser saves it as. Never log it."""
        ...

    async def presign_put(self, key: str, *, expires_s: int = 3600, content_type: str | None = None) -> str:
        """A URL for one PUT, which must send `content_type` when given. Never log it."""
        ...

    async def health(self) -> StorageHealth:
        """Asks the backend. Does not raise StorageError; says ok=False instead."""
        ...

    async def ensure_bucket(self) -> None:
        """Create the bucket where it is missing."""
        ...


@runtime_checkable
class StoreMaintenance(Protocol):
    """What operators and the sweeper need beside `ObjectStore`. The errors are the same."""

    async def list_uploads(self, prefix: str) -> list[PendingUpload]:
        """Multipart uploads under way or left behind below `prefix`, which ends with "/"."""
        ...

    async def abort_upload(self, key: str, upload_id: str) -> None:
        """A missing upload is fine."""
        ...

    async def capabilities(self) -> Capabilities:
        """Asked of the server once, then remembered."""
        ...

    async def set_breaker(self, mode: BreakerMode) -> BreakerSnapshot:
        """Force the breaker of the whole cluster, or let it decide again. Works while the backend is away."""
        ...

    async def counts(self) -> Counts:
        """What this store has counted since it was made; see `storage.counters`."""
        ...
