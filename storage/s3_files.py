"""Files to and from S3 in parts, each part with attempts of its own."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

from storage.bounded import run_bounded
from storage.byte_budget import ByteBudget
from storage.counters import CLEANUP_FAILURES, Counters
from storage.digests import Digest, digest_bytes, digest_file, sha256_file
from storage.errors import IntegrityError, StorageError, StorageTimeout
from storage.objects import ObjectInfo
from storage.resilience import Attempt, Resilience, TransientFaultError
from storage.s3_calls import S3Calls, description
from storage.settings import S3Settings

logger = logging.getLogger(__name__)

T = TypeVar("T")

PARTS_MAX = 10_000


class FileTransfers:
    """Multipart uploads and ranged downloads.

    Memory: `parts_in_flight` parts for each transfer, `bytes_in_flight_max` for all together.
    """

    def __init__(self, calls: S3Calls, resilience: Resilience, settings: S3Settings, counters: Counters) -> None:
        self._calls = calls
        self._counters = counters
        self._resilience = resilience
        self._settings = settings
        self._in_flight = ByteBudget(settings.bytes_in_flight_max)
        self._aborts: set[asyncio.Task[None]] = set()

    async def aclose(self) -> None:
        """Wait for the clean-ups that are under way."""
        await asyncio.gather(*self._aborts)

    async def upload(self, path: Path, key: str, *, content_type: str | None) -> ObjectInfo:
        """Multipart, verified. An upload that fails or is cancelled is aborted in the background."""
        size_bytes = (await asyncio.to_thread(path.stat)).st_size
        part_size_bytes = max(self._settings.part_size_bytes, -(-size_bytes // PARTS_MAX))
        digest = await asyncio.to_thread(digest_file, path, part_size_bytes)
        upload = self._upload_parts(path, key, digest, content_type)
        return await self._within("upload_file", digest.size_bytes, upload)

    async def download(self, info: ObjectInfo, path: Path, *, expected_sha256: str | None) -> ObjectInfo:
        """Into a hidden file beside `path`, which it replaces once complete and verified."""
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
        try:
            await self._within("download_file", info.size_bytes, self._download_parts(info, temporary))
            sha256 = await asyncio.to_thread(sha256_file, temporary)
            if expected_sha256 is not None and sha256 != expected_sha256:
                raise IntegrityError(info.key, expected_sha256, sha256)
            await asyncio.to_thread(temporary.replace, path)
        finally:
            temporary.unlink(missing_ok=True)
        return ObjectInfo(info.key, info.size_bytes, sha256, info.modified_at, info.content_type)

    async def _within(self, operation: str, size_bytes: int, work: Coroutine[Any, Any, T]) -> T:
        """Bound a transfer as a whole; its attempts have their own, shorter, bounds."""
        settings = self._settings
        deadline_s = settings.deadline_s + size_bytes / settings.throughput_min_bytes_per_s
        try:
            async with asyncio.timeout(deadline_s) as deadline:
                return await work
        except TimeoutError as error:
            if not deadline.expired():
                raise
            raise StorageTimeout(operation, deadline_s) from error

    async def _upload_parts(self, path: Path, key: str, digest: Digest, content_type: str | None) -> ObjectInfo:
        upload_id = await self._begin_upload(key, digest, content_type)
        try:
            parts = (self._upload_part(path, key, digest, upload_id, index) for index in range(len(digest.part_md5s)))
            sent = await run_bounded(parts, self._settings.parts_in_flight)
            return await self._complete_upload(key, digest, upload_id, sent, content_type)
        except BaseException:
            abort = asyncio.create_task(self._abort_upload(key, upload_id))
            self._aborts.add(abort)
            abort.add_done_callback(self._aborts.discard)
            raise

    async def _begin_upload(self, key: str, digest: Digest, content_type: str | None) -> str:
        parameters = {"Key": key, **description(digest.sha256, content_type)}

        async def attempt(_: Attempt) -> str:
            answer = await self._calls.send("upload_file", key, "create_multipart_upload", parameters)
            return str(answer["UploadId"])

        return await self._resilience.call("upload_file", attempt)

    async def _upload_part(
        self, path: Path, key: str, digest: Digest, upload_id: str, index: int
    ) -> dict[str, str | int]:
        offset = index * digest.part_size_bytes
        size_bytes = min(digest.part_size_bytes, digest.size_bytes - offset)
        number = index + 1
        async with self._in_flight.hold(size_bytes):
            data = await asyncio.to_thread(_read_part, path, offset, size_bytes)
            parameters = {"Key": key, "UploadId": upload_id, "PartNumber": number, "Body": data}

            async def attempt(_: Attempt) -> dict[str, str | int]:
                answer = await self._calls.send("upload_file", key, "upload_part", parameters)
                await _check_unchanged(key, digest.part_md5s[index], data, answer["ETag"])
                return {"PartNumber": number, "ETag": answer["ETag"]}

            return await self._resilience.call("upload_file", attempt, size_bytes=len(data))

    async def _complete_upload(
        self, key: str, digest: Digest, upload_id: str, parts: list[dict[str, str | int]], content_type: str | None
    ) -> ObjectInfo:
        parameters = {"Key": key, "UploadId": upload_id, "MultipartUpload": {"Parts": parts}}

        async def attempt(state: Attempt) -> ObjectInfo:
            if state.ambiguous and (stored := await self._calls.stored("upload_file", key, digest)):
                return stored
            answer = await self._calls.send("upload_file", key, "complete_multipart_upload", parameters)
            return await self._calls.confirmed("upload_file", key, digest, content_type, answer)

        return await self._resilience.call("upload_file", attempt, size_bytes=digest.size_bytes)

    async def _abort_upload(self, key: str, upload_id: str) -> None:
        async def attempt(_: Attempt) -> None:
            await self._calls.send("upload_file", key, "abort_multipart_upload", {"Key": key, "UploadId": upload_id})

        try:
            await self._resilience.call("upload_file", attempt)
        except StorageError as error:
            self._counters.add(CLEANUP_FAILURES, resource="multipart_upload")
            logger.warning("an unfinished upload was left behind", extra={"code": error.code})

    async def _download_parts(self, info: ObjectInfo, target: Path) -> None:
        descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)

        async def fetch(first: int) -> None:
            last = min(first + self._settings.part_size_bytes, info.size_bytes) - 1
            async with self._in_flight.hold(last - first + 1):
                data = await self._download_part(info.key, first, last)
                await asyncio.to_thread(os.pwrite, descriptor, data, first)

        try:
            starts = range(0, info.size_bytes, self._settings.part_size_bytes)
            await run_bounded((fetch(first) for first in starts), self._settings.parts_in_flight)
        finally:
            os.close(descriptor)

    async def _download_part(self, key: str, first: int, last: int) -> bytes:
        async def attempt(state: Attempt) -> bytes:
            data, _ = await self._calls.read("download_file", key, state, byte_range=f"bytes={first}-{last}")
            if len(data) != last - first + 1:
                raise TransientFaultError("truncated")
            return data

        return await self._resilience.call("download_file", attempt)


async def _check_unchanged(key: str, expected_md5: str, data: bytes, etag: str) -> None:
    """Raises IntegrityError for a file that has changed since it was hashed.

    What changed on its way is noticed when the upload is completed, by the ETag of the whole.
    """
    if etag.strip('"') == expected_md5:
        return
    actual = (await asyncio.to_thread(digest_bytes, data)).part_md5s[0]
    if actual != expected_md5:
        raise IntegrityError(key, expected_md5, actual)


def _read_part(path: Path, offset: int, size_bytes: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size_bytes)
