"""`ObjectStore` over S3. Plain: runs without Ray, belongs to one event loop.

Every operation goes through `Resilience.call`. A write counts when the server is known to have received the right
bytes: the ETag that it answers with equals the MD5 of what was sent. After an attempt whose answer was lost, a HEAD
tells length and ETag. Where an ETag is no MD5, the object is read back and its SHA-256 compared. That ETag is why
payloads need not be signed as well on ways that nobody listens to.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import time
import unicodedata
import urllib.parse
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC
from pathlib import Path
from typing import Any

from storage.bounded import run_bounded
from storage.breaker import BreakerMode, BreakerSnapshot, CircuitBreaker
from storage.byte_budget import ByteBudget
from storage.counters import HELD, Counts, Tally
from storage.deadlines import within
from storage.digests import digest_of, md5_of, sha256_of
from storage.errors import (
    IntegrityError,
    ObjectNotFound,
    StorageError,
    StorageMisconfigured,
    StorageRefused,
    StorageUnavailable,
)
from storage.gate import Gate, LocalGate
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
from storage.resilience import Attempt, Policy, Resilience, RetryBudget
from storage.s3_bodies import Bodies
from storage.s3_calls import Answer, S3Calls, corrupted, info_of
from storage.s3_client import S3Clients
from storage.s3_faults import raise_for_keys
from storage.s3_files import FileTransfers
from storage.s3_maintenance import KEYS_PER_S_MIN, Maintenance
from storage.settings import MIB, BreakerSettings, S3Settings

Buffer = bytes | memoryview

DELETE_KEYS_MAX = 1000
PAGE_KEYS_MAX = 1000
HASHED_IN_PLACE_BYTES_MAX = MIB // 16


class S3Store:
    """Implements `ObjectStore` and `StoreMaintenance`. Close it with `aclose` or `async with`."""

    def __init__(
        self,
        settings: S3Settings,
        breaker: BreakerSettings | None = None,
        *,
        gate: Gate | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        tally: Tally | None = None,
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._tally = tally or Tally()
        self._capabilities: Capabilities | None = None
        # More threads than cores would only take turns.
        self._hashing = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="hashing")
        self._resilience = Resilience(
            gate or LocalGate(local_breaker(breaker or BreakerSettings(), clock)),
            Policy.of(settings),
            RetryBudget(settings.retry_budget),
            max_concurrency=settings.max_concurrency,
            sleep=sleep,
            clock=clock,
            counters=self._tally,
        )
        self._clients = S3Clients(settings)
        self._calls = S3Calls(self._clients, Bodies(settings), settings.bucket, self._tally)
        self._maintenance = Maintenance(self._calls, self._resilience, settings, self._tally)
        self._in_flight = ByteBudget(settings.bytes_in_flight_max)
        # Apart from the other: whoever holds bytes of that waits for a place among the attempts, and here it is the
        # other way round.
        self._reading = ByteBudget(settings.bytes_in_flight_max)
        self._files = FileTransfers(
            self._calls, self._resilience, self._maintenance, self._in_flight, settings, self._tally
        )
        # The same in each retry, so that no more than one object can be left behind.
        self._probe_token = secrets.token_hex(8)
        self._probing = asyncio.Lock()

    async def __aenter__(self) -> S3Store:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Finish the clean-ups that are under way and close the connections."""
        await self._files.aclose()
        await self._clients.aclose()
        self._hashing.shutdown(wait=False)

    async def put(self, key: str, data: bytes, *, content_type: str | None = None) -> ObjectInfo:
        check_key(key)
        sha256 = await self._hashed(sha256_of, data)

        async def attempt(state: Attempt) -> ObjectInfo:
            # The MD5 is only compared with what the server answers: it is made while the bytes are on their way.
            md5 = self._hashed(md5_of, data)
            if state.ambiguous:
                stored = await self._calls.stored("put", key, digest_of(data, sha256, await md5))
                if stored:
                    return stored
            answer = await self._calls.put("put", key, data, sha256, content_type)
            return await self._calls.confirmed("put", key, digest_of(data, sha256, await md5), content_type, answer)

        try:
            return await self._resilience.call("put", attempt, size_bytes=len(data))
        except IntegrityError:
            await self._maintenance.discard("put", key, "corrupted_object")
            raise

    async def put_many(self, items: Sequence[PutItem]) -> list[PutOutcome]:
        async def one(item: PutItem) -> PutOutcome:
            try:
                info = await self.put(item.key, item.data, content_type=item.content_type)
            except StorageError as error:
                return PutOutcome(item.key, error=error)
            return PutOutcome(item.key, info=info)

        return await run_bounded((one(item) for item in items), self._settings.max_concurrency)

    async def get(self, key: str, *, expected_sha256: str | None = None) -> bytes:
        return bytes(await self.get_view(key, expected_sha256=expected_sha256))

    async def get_view(self, key: str, *, expected_sha256: str | None = None) -> memoryview:
        """As `get`, for those who would only copy the bytes elsewhere."""
        check_key(key)

        async def attempt(state: Attempt) -> memoryview:
            data, noted_sha256 = await self._calls.get("get", key, state, self._reading)
            expected = expected_sha256 or noted_sha256
            if expected is not None:
                actual = await self._hashed(sha256_of, data)
                if actual != expected:
                    raise corrupted(key, expected, actual)
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
        async with within("delete_many", self._settings.deadline_s + len(keys) / KEYS_PER_S_MIN):
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
        size_bytes = (await asyncio.to_thread(path.stat)).st_size
        async with within("upload_file", self._settings.deadline_s + self._moving_s(size_bytes)):
            if size_bytes > self._settings.multipart_threshold_bytes:
                return await self._files.upload(path, key, content_type=content_type)
            async with self._in_flight.hold(size_bytes):
                return await self.put(key, await asyncio.to_thread(path.read_bytes), content_type=content_type)

    async def download_file(self, key: str, path: Path, *, expected_sha256: str | None = None) -> ObjectInfo:
        async with within("download_file", self._settings.deadline_s) as deadline:
            info = await self.head(key)
            deadline.allow(self._moving_s(info.size_bytes))
            return await self._files.download(info, path, expected_sha256=expected_sha256 or info.sha256)

    async def presign_get(self, key: str, *, expires_s: int = 3600, filename: str | None = None) -> str:
        """Signed while the breaker is open too: that asks nobody, and whoever polls a job is to learn how it ended."""
        parameters = {} if filename is None else {"ResponseContentDisposition": _attachment(filename)}
        try:
            return await self._presign("presign_get", key, "get_object", expires_s, parameters, probes=False)
        except StorageUnavailable:
            # With credentials of a role, signing may have to ask for new ones.
            async with within("presign_get", self._settings.deadline_s):
                return await self._calls.presigned("presign_get", "get_object", {"Key": key, **parameters}, expires_s)

    async def presign_put(self, key: str, *, expires_s: int = 3600, content_type: str | None = None) -> str:
        parameters = {} if content_type is None else {"ContentType": content_type}
        return await self._presign("presign_put", key, "put_object", expires_s, parameters, probes=True)

    async def health(self) -> StorageHealth:
        started = self._clock()
        settings = self._settings

        async def attempt(_: Attempt) -> None:
            await self._calls.check_bucket("health")

        try:
            await self._resilience.call("health", attempt, deadline_s=settings.health_deadline_s, needs_place=False)
        except StorageError as error:
            breaker = self._resilience.gate.snapshot()
            return StorageHealth(
                False,
                breaker.state.value,
                settings.backend,
                detail=error.code,
                retry_after_s=breaker.retry_after_s,
                breaker_mode=breaker.mode.value,
            )
        latency_ms = (self._clock() - started) * 1000
        breaker = self._resilience.gate.snapshot()
        return StorageHealth(True, breaker.state.value, settings.backend, latency_ms, breaker_mode=breaker.mode.value)

    async def ensure_bucket(self) -> None:
        async def attempt(_: Attempt) -> None:
            try:
                await self._calls.check_bucket("ensure_bucket")
            except StorageMisconfigured:
                await self._create_bucket()

        await self._resilience.call("ensure_bucket", attempt)

    async def list_uploads(self, prefix: str) -> list[PendingUpload]:
        return await self._maintenance.list_uploads(check_prefix(prefix))

    async def list(self, prefix: str, *, start_after: str | None = None, limit: int | None = None) -> list[ObjectInfo]:
        check_prefix(prefix)
        found: list[ObjectInfo] = []
        position = {} if start_after is None else {"StartAfter": start_after}
        async with within("list", self._settings.deadline_s) as deadline:
            while limit is None or len(found) < limit:
                size = PAGE_KEYS_MAX if limit is None else min(PAGE_KEYS_MAX, limit - len(found))
                page = await self._page({"Prefix": prefix, "MaxKeys": size, **position})
                entries = page.get("Contents", [])
                found += [_listed(entry) for entry in entries]
                if not page.get("IsTruncated"):
                    break
                deadline.allow(len(entries) / KEYS_PER_S_MIN)
                position = {"ContinuationToken": page["NextContinuationToken"]}
        return found

    async def abort_upload(self, key: str, upload_id: str) -> None:
        await self._maintenance.abort_upload(check_key(key), upload_id)

    async def capabilities(self) -> Capabilities:
        # Two at once would see what the other does to the same object.
        async with self._probing:
            if self._capabilities is None:
                self._capabilities = await self._maintenance.capabilities(self._probe_token)
            return self._capabilities

    async def set_breaker(self, mode: BreakerMode) -> BreakerSnapshot:
        snapshot = await self._resilience.gate.force(mode)
        self._resilience.show_breaker()
        return snapshot

    async def counts(self) -> Counts:
        held = {
            "attempts": self._resilience.attempts_in_flight,
            "part_bytes": self._in_flight.held_bytes,
            "read_bytes": self._reading.held_bytes,
        }
        return {**self._tally.counts(), HELD: {what: float(number) for what, number in held.items()}}

    def _moving_s(self, size_bytes: int) -> float:
        return size_bytes / self._settings.throughput_min_bytes_per_s

    def _hashed(self, function: Callable[[Buffer], str], data: Buffer) -> asyncio.Future[str]:
        """Begins at once, in a thread where hashing takes longer than going there."""
        loop = asyncio.get_running_loop()
        if len(data) > HASHED_IN_PLACE_BYTES_MAX:
            return loop.run_in_executor(self._hashing, function, data)
        done: asyncio.Future[str] = loop.create_future()
        done.set_result(function(data))
        return done

    async def _page(self, parameters: dict[str, Any]) -> Answer:
        async def attempt(_: Attempt) -> Answer:
            return await self._calls.send("list", None, "list_objects_v2", parameters)

        return await self._resilience.call("list", attempt)

    async def _delete_batch(self, batch: Sequence[dict[str, str]]) -> None:
        parameters = {"Delete": {"Objects": batch, "Quiet": True}}

        async def attempt(_: Attempt) -> None:
            answer = await self._calls.send("delete_many", None, "delete_objects", parameters)
            raise_for_keys(answer.get("Errors", ()), "delete_many")

        await self._resilience.call("delete_many", attempt)

    async def _presign(
        self, operation: str, key: str, method: str, expires_s: int, parameters: dict[str, str], *, probes: bool
    ) -> str:
        check_key(key)
        if not 1 <= expires_s <= PRESIGN_EXPIRES_S_MAX:
            raise ValueError(f"expires_s must be between 1 and {PRESIGN_EXPIRES_S_MAX}")

        async def attempt(state: Attempt) -> str:
            # Signing asks nobody, so it must not close the breaker; as the probe it has to look for itself, or leave
            # that to the next call.
            if state.probe and probes:
                await self._calls.check_bucket(operation)
            else:
                state.made_no_call()
            return await self._calls.presigned(operation, method, {"Key": key, **parameters}, expires_s)

        return await self._resilience.call(operation, attempt, needs_place=False)

    async def _create_bucket(self) -> None:
        region = self._settings.region
        # The region that needs no naming, and must not be named.
        is_first = region == "us-east-1"
        where = {} if is_first else {"CreateBucketConfiguration": {"LocationConstraint": region}}
        try:
            await self._calls.send("ensure_bucket", None, "create_bucket", where)
        except StorageRefused as error:
            if error.reason != "bucket_exists":
                raise


def local_breaker(settings: BreakerSettings, clock: Callable[[], float] = time.monotonic) -> CircuitBreaker:
    """A breaker with these settings."""
    return CircuitBreaker(settings.failure_threshold, settings.recovery_s, settings.probe_timeout_s, clock=clock)


def _listed(entry: Answer) -> ObjectInfo:
    return ObjectInfo(entry["Key"], int(entry["Size"]), modified_at=entry["LastModified"].astimezone(UTC))


def _attachment(filename: str) -> str:
    """A Content-Disposition value: https://www.rfc-editor.org/rfc/rfc6266#appendix-D."""
    plain = unicodedata.normalize("NFKD", filename).encode("ascii", "ignore").decode()
    safe = "".join(character if character.isprintable() and character not in '"\\/;' else "_" for character in plain)
    return f"attachment; filename=\"{safe}\"; filename*=UTF-8''{urllib.parse.quote(filename, safe='')}"
