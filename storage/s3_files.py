"""Files to and from S3 in parts, each part with attempts of its own."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
from collections.abc import Mapping
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from storage.bounded import run_bounded
from storage.byte_budget import ByteBudget
from storage.counters import CLEANUP_FAILURES, Counters
from storage.digests import Crc32, Digest, sha256_file
from storage.errors import IntegrityError, StorageError, StorageRefused, StorageUnavailable
from storage.file_parts import FilePart, PartWriter
from storage.keys import owner_of
from storage.objects import ObjectInfo
from storage.resilience import Attempt, Resilience, TransientFaultError
from storage.s3_calls import Answer, S3Calls, description
from storage.s3_client import sends_checksums
from storage.s3_maintenance import UNPROBED, Maintenance
from storage.settings import MIB, S3Settings

logger = logging.getLogger(__name__)

PARTS_MAX = 10_000
HASHED_AT_ONCE_BYTES = 16 * MIB
READ_AT_ONCE_BYTES = MIB


class _Hash(Protocol):
    def update(self, data: bytes | memoryview, /) -> None: ...


@dataclass(frozen=True)
class _Look:
    """Tells whether a file is still what it was."""

    device: int
    inode: int
    size_bytes: int
    changed_ns: int


@dataclass(frozen=True)
class _SentPart:
    """`etag` is the server's answer, `md5` (hex) is of what was sent. `checks` are the checksums sent with it, as S3
    names them."""

    number: int
    etag: str
    md5: str
    checks: Mapping[str, str]


class FileTransfers:
    """Multipart uploads and ranged downloads.

    At one time `parts_in_flight` parts of each transfer are on their way, within `in_flight` all together; in memory is
    a piece or two of each. Whoever calls bounds the time of a whole transfer.
    """

    def __init__(
        self,
        calls: S3Calls,
        resilience: Resilience,
        maintenance: Maintenance,
        in_flight: ByteBudget,
        settings: S3Settings,
        counters: Counters,
    ) -> None:
        self._calls = calls
        self._maintenance = maintenance
        self._counters = counters
        self._resilience = resilience
        self._settings = settings
        self._in_flight = in_flight
        self._aborts: set[asyncio.Task[None]] = set()

    async def aclose(self) -> None:
        """Wait for the clean-ups that are under way."""
        await asyncio.gather(*self._aborts)

    async def upload(self, path: Path, key: str, *, content_type: str | None) -> ObjectInfo:
        """Multipart, verified. An upload that fails or is cancelled is aborted in the background.

        Raises IntegrityError for a file that changes while it is sent.
        """
        before = await asyncio.to_thread(_look_of, path)
        # It has to be known before the first part where it is noted with the object, and is computed beside the
        # sending where the backend would forget it.
        keeps_notes = UNPROBED[self._settings.backend]["keeps_metadata"]
        sha256 = await asyncio.to_thread(sha256_file, path) if keeps_notes else None
        return await self._upload_parts(path, key, before, sha256, content_type)

    async def download(self, info: ObjectInfo, path: Path, *, expected_sha256: str | None) -> ObjectInfo:
        """Into a hidden file beside `path`, which it replaces once complete and verified."""
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
        try:
            sha256 = await self._download_parts(info, temporary)
            if expected_sha256 is not None and sha256 != expected_sha256:
                raise IntegrityError(info.key, expected_sha256, sha256)
            await asyncio.to_thread(temporary.replace, path)
        finally:
            temporary.unlink(missing_ok=True)
        return ObjectInfo(info.key, info.size_bytes, sha256, info.modified_at, info.content_type)

    async def _upload_parts(
        self, path: Path, key: str, before: _Look, sha256: str | None, content_type: str | None
    ) -> ObjectInfo:
        part_size_bytes = max(self._settings.part_size_bytes, -(-before.size_bytes // PARTS_MAX))
        upload_id = await self._begin_upload(key, sha256, content_type)
        hashing = asyncio.create_task(_sha256_of(path, before.size_bytes, known=sha256))
        try:
            starts = range(0, before.size_bytes, part_size_bytes)
            ends = (min(first + part_size_bytes, before.size_bytes) for first in starts)
            parts = (
                self._upload_part(path, key, upload_id, number, first, end)
                for number, (first, end) in enumerate(zip(starts, ends, strict=True), start=1)
            )
            sent = await run_bounded(parts, self._settings.parts_in_flight)
            digest = Digest(before.size_bytes, await hashing, tuple(part.md5 for part in sent), part_size_bytes)
            if await asyncio.to_thread(_look_of, path) != before:
                raise IntegrityError(key, sha256 or "one file", "a file that changes")
            return await self._complete_upload(key, digest, upload_id, sent, content_type)
        except BaseException as error:
            abort = asyncio.create_task(self._abort_upload(key, upload_id))
            self._aborts.add(abort)
            abort.add_done_callback(self._aborts.discard)
            if isinstance(error, StorageUnavailable):
                # To begin it took an attempt.
                raise error.after(1) from error
            raise
        finally:
            hashing.cancel()
            await asyncio.gather(hashing, return_exceptions=True)

    async def _begin_upload(self, key: str, sha256: str | None, content_type: str | None) -> str:
        # Parts with a checksum are refused by an upload that was begun without one.
        checked = {"ChecksumAlgorithm": "CRC32"} if sends_checksums(self._settings) else {}
        parameters = {"Key": key, **description(sha256, content_type), **checked}

        async def attempt(_: Attempt) -> str:
            answer = await self._calls.send("upload_file", key, "create_multipart_upload", parameters)
            return str(answer["UploadId"])

        return await self._resilience.call("upload_file", attempt)

    async def _upload_part(self, path: Path, key: str, upload_id: str, number: int, first: int, end: int) -> _SentPart:
        parameters = {"Key": key, "UploadId": upload_id, "PartNumber": number}

        async def attempt(_: Attempt) -> _SentPart:
            part = FilePart(path, first, end - first)
            checks = await self._checks_of(path, first, end)
            # What changes on its way is noticed when the upload is completed, by the ETag of the whole.
            try:
                sent = {**parameters, **checks, "Body": part}
                answer = await self._calls.send("upload_file", key, "upload_part", sent)
            except Exception:
                if part.problem is not None:
                    # No fault of the server's, and no better in another attempt.
                    raise part.problem from None
                raise
            return _SentPart(number, answer["ETag"], part.md5, checks)

        try:
            async with self._in_flight.hold(end - first):
                return await self._resilience.call("upload_file", attempt, size_bytes=end - first)
        except EOFError:
            raise IntegrityError(key, "one file", "a file that changes") from None

    async def _checks_of(self, path: Path, first: int, end: int) -> Mapping[str, str]:
        """In a thread: the client would read and hash the part on the event loop. Raises OSError."""
        if not sends_checksums(self._settings):
            return {}
        crc32 = Crc32()
        await asyncio.to_thread(_hash_part, path, first, end - first, crc32)
        return {"ChecksumCRC32": crc32.base64()}

    async def _complete_upload(
        self,
        key: str,
        digest: Digest,
        upload_id: str,
        parts: list[_SentPart],
        content_type: str | None,
    ) -> ObjectInfo:
        named = [{"PartNumber": part.number, "ETag": part.etag, **part.checks} for part in parts]
        parameters = {"Key": key, "UploadId": upload_id, "MultipartUpload": {"Parts": named}}
        answer: Answer | None = None

        async def attempt(state: Attempt) -> ObjectInfo:
            # An upload can be completed once only: from then on there is nothing to do but to look at the object.
            nonlocal answer
            if answer is None:
                if state.ambiguous and (stored := await self._calls.stored("upload_file", key, digest)):
                    return stored
                answer = await self._completed(key, parameters, was_tried=state.ambiguous)
            return await self._calls.confirmed("upload_file", key, digest, content_type, answer)

        try:
            return await self._resilience.call("upload_file", attempt, size_bytes=digest.size_bytes)
        except IntegrityError:
            await self._maintenance.discard("upload_file", key, "corrupted_object")
            raise

    async def _completed(self, key: str, parameters: dict[str, Any], *, was_tried: bool) -> Answer:
        try:
            return await self._calls.send("upload_file", key, "complete_multipart_upload", parameters)
        except StorageRefused as error:
            if was_tried and error.reason == "no_such_upload":
                return {}
            raise

    async def _abort_upload(self, key: str, upload_id: str) -> None:
        try:
            await self._maintenance.abort_upload(key, upload_id)
        except StorageError as error:
            self._counters.add(CLEANUP_FAILURES, resource="multipart_upload")
            owner = owner_of(self._settings.prefix, key)
            logger.warning("the unfinished upload %s of %s was left behind (%s)", upload_id, owner, error.code)

    async def _download_parts(self, info: ObjectInfo, target: Path) -> str:
        """Returns the SHA-256 of what is in the file, which is read back while later parts are still on their way."""
        await asyncio.to_thread(target.touch, 0o644, exist_ok=False)
        size_bytes = self._settings.part_size_bytes
        starts = range(0, info.size_bytes, size_bytes)
        written = {first: asyncio.Event() for first in starts}

        async def fetch(first: int) -> None:
            last = min(first + size_bytes, info.size_bytes) - 1
            async with self._in_flight.hold(last - first + 1):
                await self._download_part(info.key, first, last, target)
            written[first].set()

        async def hashed() -> str:
            sha256 = hashlib.sha256()
            for first in starts:
                await written[first].wait()
                await asyncio.to_thread(_hash_part, target, first, size_bytes, sha256)
            return sha256.hexdigest()

        hashing = asyncio.create_task(hashed())
        try:
            await run_bounded((fetch(first) for first in starts), self._settings.parts_in_flight)
            return await hashing
        finally:
            hashing.cancel()
            await asyncio.gather(hashing, return_exceptions=True)

    async def _download_part(self, key: str, first: int, last: int, target: Path) -> None:
        size_bytes = last - first + 1

        async def attempt(_: Attempt) -> None:
            writer = PartWriter(target, first)
            async with aclosing(self._calls.stream_range("download_file", key, first, last)) as pieces:
                async for piece in pieces:
                    await writer.write(piece, at_most_bytes=size_bytes)
            await writer.flush()
            if writer.written_bytes != size_bytes:
                raise TransientFaultError("truncated")

        await self._resilience.call("download_file", attempt, size_bytes=size_bytes)


def _look_of(path: Path) -> _Look:
    found = path.stat()
    return _Look(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


async def _sha256_of(path: Path, size_bytes: int, *, known: str | None) -> str:
    """Of the file as it is on disk, in one pass. In steps: a thread cannot be cancelled."""
    if known is not None:
        return known
    sha256 = hashlib.sha256()
    for first in range(0, size_bytes, HASHED_AT_ONCE_BYTES):
        await asyncio.to_thread(_hash_part, path, first, HASHED_AT_ONCE_BYTES, sha256)
    return sha256.hexdigest()


def _hash_part(path: Path, first: int, size_bytes: int, hashed: _Hash) -> None:
    """Opens the file by its name: a thread cannot be cancelled, and a descriptor that is closed under it may be
    another file's by then."""
    buffer = memoryview(bytearray(READ_AT_ONCE_BYTES))
    with path.open("rb", buffering=0) as file:
        file.seek(first)
        while size_bytes > 0 and (read := file.readinto(buffer[:size_bytes])):
            hashed.update(buffer[:read])
            size_bytes -= read
