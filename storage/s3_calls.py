"""Single S3 calls, mapped to our errors, and what several of them together say about an object.

To be used inside one attempt of `Resilience.call`: nothing here retries or bounds its own time.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator, Mapping
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Protocol

from storage.byte_budget import ByteBudget
from storage.counters import REQUESTS, Counters
from storage.digests import Digest, is_hash
from storage.errors import IntegrityError, ObjectNotFound
from storage.file_parts import PIECE_BYTES
from storage.objects import ObjectInfo
from storage.resilience import Attempt, TransientFaultError
from storage.s3_bodies import SHA256_METADATA, Bodies
from storage.s3_faults import mapped
from storage.settings import MIB

Answer = Mapping[str, Any]

# They move bytes within the server, for minutes where there are many, or wait there for the parts before them, as
# rclone's do; only the attempt's own timeout is for them. A part sent twice can spoil the whole upload.
ANSWERED_LATE = frozenset({"complete_multipart_upload", "copy_object", "upload_part"})


class Clients(Protocol):
    """Opens the clients when they are first needed."""

    async def internal(self) -> Any:
        """The client that works."""
        ...

    async def patient(self) -> Any:
        """The client for calls that are answered only when the server has done its work."""
        ...

    async def public(self) -> Any:
        """The client that signs URLs for the address that others can reach."""
        ...


class S3Calls:
    """The calls on one bucket. `operation` is what our caller is doing, for the errors."""

    def __init__(self, clients: Clients, bodies: Bodies, bucket: str, counters: Counters) -> None:
        self._clients = clients
        self._bodies = bodies
        self._bucket = bucket
        self._counters = counters

    async def send(self, operation: str, key: str | None, method: str, parameters: Mapping[str, Any]) -> Answer:
        """`key` None: the call concerns the bucket, so that 404 means the bucket is missing."""
        with mapped(operation, key):
            client = await (self._clients.patient() if method in ANSWERED_LATE else self._clients.internal())
            self._counters.add(REQUESTS, operation=operation, method=method)
            answer: Answer = await getattr(client, method)(Bucket=self._bucket, **parameters)
            return answer

    async def presigned(self, operation: str, method: str, parameters: Mapping[str, str], expires_s: int) -> str:
        with mapped(operation, None):
            client = await self._clients.public()
            target = {"Bucket": self._bucket, **parameters}
            url: str = await client.generate_presigned_url(method, Params=target, ExpiresIn=expires_s)
            return url

    async def check_bucket(self, operation: str) -> None:
        """Raises StorageMisconfigured when it does not exist."""
        await self.send(operation, None, "head_bucket", {})

    async def head(self, operation: str, key: str) -> Answer:
        return await self.send(operation, key, "head_object", {"Key": key})

    async def get(self, operation: str, key: str, state: Attempt, room: ByteBudget) -> tuple[memoryview, str | None]:
        """The whole object, of the length that was announced, and the SHA-256 that was noted with it.

        Large ones are read where there is `room`.
        """
        self._counters.add(REQUESTS, operation=operation, method="get_object")
        async with AsyncExitStack() as held:
            with mapped(operation, key):
                found = await self._bodies.open(key)
            state.allow_for(found.size_bytes)
            if found.size_bytes > MIB:
                async with state.standing_still():
                    await held.enter_async_context(room.hold(found.size_bytes))
            with mapped(operation, key):
                data = await found.read()
        if len(data) != found.size_bytes:
            raise TransientFaultError("truncated")
        return data, found.sha256

    async def put(self, operation: str, key: str, data: bytes, sha256: str, content_type: str | None) -> Answer:
        """Store the whole object. That it has arrived is only known once its answer is `confirmed`."""
        self._counters.add(REQUESTS, operation=operation, method="put_object")
        with mapped(operation, key):
            return {"ETag": await self._bodies.put(key, data, sha256=sha256, content_type=content_type)}

    async def get_range(self, operation: str, key: str, first: int, last: int) -> bytes:
        """The bytes from `first` to `last`, both included, or others where the server knows no ranges."""
        return b"".join([piece async for piece in self.stream_range(operation, key, first, last)])

    async def stream_range(self, operation: str, key: str, first: int, last: int) -> AsyncGenerator[bytes, None]:
        """As `get_range`, as they come."""
        wanted = {"Key": key, "Range": f"bytes={first}-{last}"}
        answer = await self.send(operation, key, "get_object", wanted)
        with mapped(operation, key):
            async with answer["Body"] as body:
                async for piece in body.iter_chunks(PIECE_BYTES):
                    yield piece

    async def stored(self, operation: str, key: str, digest: Digest) -> ObjectInfo | None:
        """The object, if it is there and has these bytes."""
        try:
            answer = await self.head(operation, key)
        except ObjectNotFound:
            return None
        if int(answer["ContentLength"]) != digest.size_bytes:
            return None
        if not digest.confirmed_by(answer["ETag"]) and await self._sha256_of(operation, key) != digest.sha256:
            return None
        return info_of(key, answer, sha256=digest.sha256)

    async def confirmed(
        self, operation: str, key: str, digest: Digest, content_type: str | None, answer: Answer
    ) -> ObjectInfo:
        """The object that a write's `answer` speaks of. Its ETag is of what the server received; where it is no MD5,
        or not of these bytes, the object is looked at."""
        if digest.confirmed_by(answer.get("ETag", "")):
            return ObjectInfo(key, digest.size_bytes, digest.sha256, _date_of(answer), content_type)
        info = await self.stored(operation, key, digest)
        if info is None:
            raise corrupted(key, digest.sha256, "other bytes")
        return info

    async def is_copy(self, operation: str, original: Answer, source: str, target: str) -> bool:
        """Whether `target` holds the bytes of `source`, whose HEAD gave `original`."""
        try:
            copied = await self.head(operation, target)
        except ObjectNotFound:
            return False
        if original["ContentLength"] != copied["ContentLength"]:
            return False
        if original["ETag"] == copied["ETag"] and is_hash(original["ETag"]):
            return True
        return await self._sha256_of(operation, source) == await self._sha256_of(operation, target)

    async def _sha256_of(self, operation: str, key: str) -> str:
        answer = await self.send(operation, key, "get_object", {"Key": key})
        sha256 = hashlib.sha256()
        with mapped(operation, key):
            async with answer["Body"] as body:
                async for chunk in body.iter_chunks(MIB):
                    sha256.update(chunk)
        return sha256.hexdigest()


def _date_of(answer: Answer) -> datetime:
    """When the server answered."""
    date = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date")
    return datetime.now(UTC) if date is None else parsedate_to_datetime(date).astimezone(UTC)


def corrupted(key: str, expected: str, actual: str) -> TransientFaultError:
    """Another attempt may bring the right bytes; the backend's health is not in doubt."""
    return TransientFaultError("corrupted", counts=False, final=IntegrityError(key, expected, actual))


def description(sha256: str | None, content_type: str | None) -> dict[str, Any]:
    """What is stored beside the bytes."""
    noted = {} if sha256 is None else {"Metadata": {SHA256_METADATA: sha256}}
    return {**noted, **({} if content_type is None else {"ContentType": content_type})}


def info_of(key: str, answer: Answer, *, sha256: str | None = None) -> ObjectInfo:
    """From the answer of a HEAD. `sha256` when it has just been proved."""
    return ObjectInfo(
        key=key,
        size_bytes=int(answer["ContentLength"]),
        sha256=sha256 or answer.get("Metadata", {}).get(SHA256_METADATA),
        modified_at=answer["LastModified"].astimezone(UTC),
        content_type=answer.get("ContentType"),
    )
