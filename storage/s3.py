"""`ObjectStore` over S3. Plain: runs without Ray, belongs to one event loop.

Every operation goes through `Resilience.call`. A write counts when the server's copy is known to be right: the
length and the ETag of a HEAD equal the length and MD5 of what was sent. (rclone computes that ETag from its file,
AWS from what it received.) Where an ETag is no MD5, the object is read back and its SHA-256 compared.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
import unicodedata
import urllib.parse
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from datetime import UTC
from pathlib import Path
from typing import Any, TypeVar

from aiobotocore.config import AioConfig
from aiobotocore.httpsession import AIOHTTPSession
from aiobotocore.session import get_session

from storage.breaker import CircuitBreaker
from storage.digests import digest_bytes
from storage.errors import ObjectNotFound, StorageError, StorageFailed, StorageMisconfigured
from storage.keys import check_key, check_prefix
from storage.objects import PRESIGN_EXPIRES_S_MAX, ObjectInfo, PutItem, PutOutcome, StorageHealth
from storage.resilience import Attempt, Gate, LocalGate, Policy, Resilience, RetryBudget, TransientFaultError
from storage.s3_calls import Answer, S3Calls, corrupted, description, info_of
from storage.s3_files import FileTransfers, run_bounded
from storage.settings import MIB, BreakerSettings, S3Settings

T = TypeVar("T")

# Anything else is refused before it is sent: on rclone, tagging and ACL calls overwrite or delete the object.
ALLOWED_CALLS = frozenset(
    {
        "AbortMultipartUpload",
        "CompleteMultipartUpload",
        "CopyObject",
        "CreateBucket",
        "CreateMultipartUpload",
        "DeleteObject",
        "DeleteObjects",
        "GetObject",
        "HeadBucket",
        "HeadObject",
        "ListObjectsV2",
        "PutObject",
        "UploadPart",
    }
)
DELETE_KEYS_MAX = 1000
PAGE_KEYS_MAX = 1000
# Health and presigning never queue behind transfers, so they need connections of their own.
SPARE_CONNECTIONS = 8


class S3Store:
    """Implements `storage.objects.ObjectStore`. Close it with `aclose` or `async with`."""

    def __init__(
        self,
        settings: S3Settings,
        breaker: BreakerSettings | None = None,
        *,
        gate: Gate | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._resilience = Resilience(
            gate or LocalGate(local_breaker(breaker or BreakerSettings(), clock)),
            Policy.of(settings),
            RetryBudget(settings.retry_budget),
            max_concurrency=settings.max_concurrency,
            sleep=sleep,
        )
        self._clients = _Clients(settings)
        self._calls = S3Calls(self._clients, settings.bucket)
        self._files = FileTransfers(self._calls, self._resilience, settings)

    async def __aenter__(self) -> S3Store:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Finish the clean-ups that are under way and close the connections."""
        await self._files.aclose()
        await self._clients.aclose()

    async def put(self, key: str, data: bytes, *, content_type: str | None = None) -> ObjectInfo:
        check_key(key)
        digest = await _in_thread_if(len(data) > MIB, digest_bytes, data)
        parameters = {"Key": key, "Body": data, **description(digest.sha256, content_type)}

        async def attempt(state: Attempt) -> ObjectInfo:
            if state.ambiguous and (stored := await self._calls.stored("put", key, digest)):
                return stored
            await self._calls.send("put", key, "put_object", parameters)
            return await self._calls.verified("put", key, digest)

        return await self._resilience.call("put", attempt, size_bytes=len(data))

    async def put_many(self, items: Sequence[PutItem]) -> list[PutOutcome]:
        async def one(item: PutItem) -> PutOutcome:
            try:
                info = await self.put(item.key, item.data, content_type=item.content_type)
            except StorageError as error:
                return PutOutcome(item.key, error=error)
            return PutOutcome(item.key, info=info)

        return await run_bounded((one(item) for item in items), self._settings.max_concurrency)

    async def get(self, key: str, *, expected_sha256: str | None = None) -> bytes:
        check_key(key)

        async def attempt(state: Attempt) -> bytes:
            data = await self._calls.read("get", key, state)
            if expected_sha256 is not None:
                actual = await _in_thread_if(len(data) > MIB, _sha256, data)
                if actual != expected_sha256:
                    raise corrupted(key, expected_sha256, actual)
            return data

        return await self._resilience.call("get", attempt)

    async def head(self, key: str) -> ObjectInfo:
        check_key(key)

        async def attempt(_: Attempt) -> ObjectInfo:
            return info_of(key, await self._calls.head("head", key))

        return await self._resilience.call("head", attempt)

    async def exists(self, key: str) -> bool:
        try:
            await self.head(key)
        except ObjectNotFound:
            return False
        return True

    async def delete(self, key: str) -> None:
        check_key(key)

        async def attempt(_: Attempt) -> None:
            try:
                await self._calls.send("delete", key, "delete_object", {"Key": key})
            except ObjectNotFound:
                return

        await self._resilience.call("delete", attempt)

    async def delete_many(self, keys: Sequence[str]) -> int:
        for key in keys:
            check_key(key)
        for first in range(0, len(keys), DELETE_KEYS_MAX):
            await self._delete_batch([{"Key": key} for key in keys[first : first + DELETE_KEYS_MAX]])
        return len(keys)

    async def copy(self, source: str, target: str) -> ObjectInfo:
        """In one call, which AWS allows up to 5 GiB."""
        check_key(source)
        check_key(target)
        origin = {"Bucket": self._settings.bucket, "Key": source}

        async def attempt(state: Attempt) -> ObjectInfo:
            original = await self._calls.head("copy", source)
            state.allow_for(int(original["ContentLength"]))
            if not (state.ambiguous and await self._calls.is_copy("copy", original, source, target)):
                await self._calls.send("copy", source, "copy_object", {"Key": target, "CopySource": origin})
                if not await self._calls.is_copy("copy", original, source, target):
                    raise corrupted(target, "the source's bytes", "other bytes")
            return info_of(target, await self._calls.head("copy", target))

        return await self._resilience.call("copy", attempt)

    async def upload_file(self, path: Path, key: str, *, content_type: str | None = None) -> ObjectInfo:
        check_key(key)
        if (await asyncio.to_thread(path.stat)).st_size > self._settings.multipart_threshold_bytes:
            return await self._files.upload(path, key, content_type=content_type)
        return await self.put(key, await asyncio.to_thread(path.read_bytes), content_type=content_type)

    async def download_file(self, key: str, path: Path, *, expected_sha256: str | None = None) -> ObjectInfo:
        return await self._files.download(await self.head(key), path, expected_sha256=expected_sha256)

    async def presign_get(self, key: str, *, expires_s: int = 3600, filename: str | None = None) -> str:
        parameters = {} if filename is None else {"ResponseContentDisposition": _attachment(filename)}
        return await self._presign("presign_get", key, "get_object", expires_s, parameters)

    async def presign_put(self, key: str, *, expires_s: int = 3600, content_type: str | None = None) -> str:
        parameters = {} if content_type is None else {"ContentType": content_type}
        return await self._presign("presign_put", key, "put_object", expires_s, parameters)

    async def health(self) -> StorageHealth:
        started = self._clock()
        settings = self._settings

        async def attempt(_: Attempt) -> None:
            await self._calls.check_bucket("health")

        try:
            await self._resilience.call("health", attempt, deadline_s=settings.health_deadline_s, needs_slot=False)
        except StorageError as error:
            breaker = self._resilience.gate.snapshot()
            return StorageHealth(
                False, breaker.state.value, settings.backend, detail=error.code, retry_after_s=breaker.retry_after_s
            )
        latency_ms = (self._clock() - started) * 1000
        return StorageHealth(True, self._resilience.gate.snapshot().state.value, settings.backend, latency_ms)

    async def ensure_bucket(self) -> None:
        async def attempt(_: Attempt) -> None:
            try:
                await self._calls.check_bucket("ensure_bucket")
            except StorageMisconfigured:
                await self._create_bucket()

        await self._resilience.call("ensure_bucket", attempt)

    async def list(self, prefix: str, *, start_after: str | None = None, limit: int | None = None) -> list[ObjectInfo]:
        check_prefix(prefix)
        found: list[ObjectInfo] = []
        position = {} if start_after is None else {"StartAfter": start_after}
        while limit is None or len(found) < limit:
            size = PAGE_KEYS_MAX if limit is None else min(PAGE_KEYS_MAX, limit - len(found))
            page = await self._page({"Prefix": prefix, "MaxKeys": size, **position})
            found += [_listed(entry) for entry in page.get("Contents", [])]
            if not page.get("IsTruncated"):
                break
            position = {"ContinuationToken": page["NextContinuationToken"]}
        return found

    async def _page(self, parameters: dict[str, Any]) -> Answer:
        async def attempt(_: Attempt) -> Answer:
            return await self._calls.send("list", None, "list_objects_v2", parameters)

        return await self._resilience.call("list", attempt)

    async def _delete_batch(self, batch: Sequence[dict[str, str]]) -> None:
        parameters = {"Delete": {"Objects": batch, "Quiet": True}}

        async def attempt(_: Attempt) -> None:
            answer = await self._calls.send("delete_many", None, "delete_objects", parameters)
            if answer.get("Errors"):
                raise TransientFaultError("not_all_deleted", counts=False)

        await self._resilience.call("delete_many", attempt)

    async def _presign(self, operation: str, key: str, method: str, expires_s: int, parameters: dict[str, str]) -> str:
        check_key(key)
        if not 1 <= expires_s <= PRESIGN_EXPIRES_S_MAX:
            raise ValueError(f"expires_s must be between 1 and {PRESIGN_EXPIRES_S_MAX}")

        async def attempt(state: Attempt) -> str:
            # Signing asks nobody, so it must not close the breaker; as the probe it has to look for itself.
            if state.probe:
                await self._calls.check_bucket(operation)
            else:
                state.made_no_call()
            return await self._calls.presigned(operation, method, {"Key": key, **parameters}, expires_s)

        return await self._resilience.call(operation, attempt, needs_slot=False)

    async def _create_bucket(self) -> None:
        region = self._settings.region
        elsewhere = self._settings.backend == "aws" and region != "us-east-1"
        where = {"CreateBucketConfiguration": {"LocationConstraint": region}} if elsewhere else {}
        try:
            await self._calls.send("ensure_bucket", None, "create_bucket", where)
        except StorageFailed as error:
            if error.reason != "bucket_exists":
                raise


class _Clients:
    """Implements `storage.s3_calls.Clients`."""

    def __init__(self, settings: S3Settings) -> None:
        self._settings = settings
        self._stack = AsyncExitStack()
        self._opened: dict[str | None, Any] = {}
        self._opening = asyncio.Lock()

    async def internal(self) -> Any:
        return await self._client(self._settings.endpoint_url)

    async def public(self) -> Any:
        return await self._client(self._settings.public_endpoint_url or self._settings.endpoint_url)

    async def aclose(self) -> None:
        self._opened.clear()
        await self._stack.aclose()

    async def _client(self, endpoint_url: str | None) -> Any:
        if endpoint_url in self._opened:
            return self._opened[endpoint_url]
        async with self._opening:
            if endpoint_url not in self._opened:
                self._opened[endpoint_url] = await self._open(endpoint_url)
            return self._opened[endpoint_url]

    async def _open(self, endpoint_url: str | None) -> Any:
        settings = self._settings
        context = get_session().create_client(
            "s3",
            endpoint_url=endpoint_url,
            region_name=settings.region,
            config=_client_config(settings),
            **_credentials(settings),
        )
        client = await self._stack.enter_async_context(context)
        client.meta.events.register("request-created.s3", _drop_expect_header)
        client.meta.events.register("before-parameter-build.s3", _refuse_other_calls)
        return client


class _OneRequestSession(AIOHTTPSession):  # type: ignore[misc]
    """aiohttp sends an idempotent request again, by itself and at once, when its connection was cut.

    That is a second owner of retries, and it would repeat a write without looking whether it had its effect.
    """

    async def _get_session(self, proxy_url: Any) -> Any:
        session = await super()._get_session(proxy_url)
        session._retry_connection = False
        return session


def local_breaker(settings: BreakerSettings, clock: Callable[[], float] = time.monotonic) -> CircuitBreaker:
    """A breaker with these settings."""
    return CircuitBreaker(settings.failure_threshold, settings.recovery_s, settings.probe_timeout_s, clock=clock)


def _client_config(settings: S3Settings) -> AioConfig:
    aws = settings.backend == "aws"
    checksums = "when_supported" if aws else "when_required"
    return AioConfig(
        signature_version="s3v4",
        s3={"addressing_style": "auto" if aws else "path"},
        request_checksum_calculation=checksums,
        response_checksum_validation=checksums,
        # One request for one attempt: `Resilience` owns the retries.
        retries={"mode": "standard", "total_max_attempts": 1},
        connect_timeout=settings.connect_timeout_s,
        read_timeout=settings.read_timeout_s,
        max_pool_connections=settings.max_concurrency + SPARE_CONNECTIONS,
        http_session_cls=_OneRequestSession,
        # A proxy in the environment must not come between us and a server beside us.
        proxies=None if aws else {},
    )


def _credentials(settings: S3Settings) -> dict[str, str]:
    key, secret = settings.access_key_id, settings.secret_access_key
    if key is not None and secret is not None:
        return {"aws_access_key_id": key.get_secret_value(), "aws_secret_access_key": secret.get_secret_value()}
    if settings.backend != "aws" or key is not secret:
        raise StorageMisconfigured("an access key id and a secret access key are needed")
    return {}


def _drop_expect_header(request: Any, **_: Any) -> None:
    """aiohttp waits for "100 Continue" without a timeout, for ever where a server stays silent."""
    del request.headers["Expect"]


def _refuse_other_calls(model: Any, **_: Any) -> None:
    if model.name not in ALLOWED_CALLS:
        raise StorageMisconfigured(f"{model.name} is not among the S3 calls that storage makes")


async def _in_thread_if(large: bool, function: Callable[[bytes], T], data: bytes) -> T:
    return await asyncio.to_thread(function, data) if large else function(data)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _listed(entry: Answer) -> ObjectInfo:
    return ObjectInfo(entry["Key"], int(entry["Size"]), modified_at=entry["LastModified"].astimezone(UTC))


def _attachment(filename: str) -> str:
    """A Content-Disposition value: https://www.rfc-editor.org/rfc/rfc6266#appendix-D."""
    plain = unicodedata.normalize("NFKD", filename).encode("ascii", "ignore").decode()
    safe = "".join(character if character.isprintable() and character not in '"\\/;' else "_" for character in plain)
    return f"attachment; filename=\"{safe}\"; filename*=UTF-8''{urllib.parse.quote(filename, safe='')}"
