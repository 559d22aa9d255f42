"""What keeps a bucket clean and tells what its server can do: orphan multipart uploads, capabilities."""

from __future__ import annotations

import logging
from datetime import UTC
from typing import Any

from storage.counters import CLEANUP_FAILURES, Counters
from storage.deadlines import within
from storage.errors import ObjectNotFound, StorageError, StorageRefused
from storage.keys import owner_of, probe_object
from storage.objects import Capabilities, PendingUpload
from storage.resilience import Attempt, Resilience
from storage.s3_calls import Answer, S3Calls
from storage.s3_faults import PRECONDITION
from storage.settings import S3Settings

logger = logging.getLogger(__name__)

PROBE_BODY = b"probe"
# Listing or removing more slowly than this ends at the deadline, however much there is.
KEYS_PER_S_MIN = 100

# Not tried out: on some servers the attempt itself destroys objects (rclone takes a tagging call for a write).
UNPROBED: dict[str, dict[str, bool]] = {
    "rclone": {"tags": False, "lifecycle": False, "presigned_post": False, "keeps_metadata": False},
    "moto": {"tags": True, "lifecycle": True, "presigned_post": True, "keeps_metadata": False},
    "aws": {"tags": True, "lifecycle": True, "presigned_post": True, "keeps_metadata": True},
}


class Maintenance:
    """Each method is made of operations that go through `Resilience.call`."""

    def __init__(self, calls: S3Calls, resilience: Resilience, settings: S3Settings, counters: Counters) -> None:
        self._calls = calls
        self._counters = counters
        self._resilience = resilience
        self._settings = settings

    async def list_uploads(self, prefix: str) -> list[PendingUpload]:
        """Multipart uploads that were begun below `prefix` and neither completed nor aborted."""
        found: list[PendingUpload] = []
        position: dict[str, str] = {}
        async with within("list_uploads", self._settings.deadline_s) as deadline:
            while True:
                page = await self._uploads_page({"Prefix": prefix, **position})
                entries = page.get("Uploads", [])
                # Not every server filters by the prefix.
                found += [_pending(entry) for entry in entries if entry["Key"].startswith(prefix)]
                if not page.get("IsTruncated"):
                    return found
                deadline.allow(len(entries) / KEYS_PER_S_MIN)
                position = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    async def abort_upload(self, key: str, upload_id: str) -> None:
        """Free what its parts occupy. One that is gone is fine."""
        parameters = {"Key": key, "UploadId": upload_id}

        async def attempt(_: Attempt) -> None:
            try:
                await self._calls.send("abort_upload", key, "abort_multipart_upload", parameters)
            except ObjectNotFound:
                return
            except StorageRefused as error:
                if error.reason != "no_such_upload":
                    raise

        await self._resilience.call("abort_upload", attempt)

    async def discard(self, operation: str, key: str, resource: str, *, deadline_s: float | None = None) -> None:
        """Remove an object that nobody is to read, as one whose bytes are not those that were sent. A failure is logged
        and counted: our caller raises what is worse, or has what it wanted."""

        async def attempt(_: Attempt) -> None:
            try:
                await self._calls.send(operation, key, "delete_object", {"Key": key})
            except ObjectNotFound:
                return

        try:
            await self._resilience.call(operation, attempt, deadline_s=deadline_s)
        except StorageError as error:
            self._counters.add(CLEANUP_FAILURES, resource=resource)
            owner = owner_of(self._settings.prefix, key)
            logger.warning("an object of %s was left behind: %s (%s)", owner, resource, error.code)

    async def capabilities(self, token: str) -> Capabilities:
        """Try the server out with an object of its own, named by `token`, which is removed again.

        Where that fails it stays until the sweeper finds it, logged and counted.
        """
        key = probe_object(self._settings.prefix, token)
        may_be_there = False

        async def attempt(_: Attempt) -> Capabilities:
            nonlocal may_be_there
            may_be_there = True
            return await self._probed(key)

        try:
            return await self._resilience.call("capabilities", attempt)
        finally:
            if may_be_there:
                await self.discard("capabilities", key, "probe", deadline_s=self._settings.health_deadline_s)

    async def _probed(self, key: str) -> Capabilities:
        write = {"Key": key, "Body": PROBE_BODY}
        answer = await self._calls.send("capabilities", key, "put_object", write)
        part = await self._calls.get_range("capabilities", key, 1, 2)
        return Capabilities(
            conditional_writes=await self._refuses_to_replace(key, write),
            ranged_reads=part == PROBE_BODY[1:3],
            multipart_listing=await self._lists_uploads(),
            answers_with_etag="ETag" in answer,
            **UNPROBED[self._settings.backend],
        )

    async def _refuses_to_replace(self, key: str, write: dict[str, Any]) -> bool:
        """Whether a write under the condition that nothing is there fails for that reason: a server that does not know
        the condition may refuse it for another."""
        try:
            await self._calls.send("capabilities", key, "put_object", {**write, "IfNoneMatch": "*"})
        except StorageRefused as error:
            return error.reason == PRECONDITION
        return False

    async def _lists_uploads(self) -> bool:
        try:
            await self._calls.send("capabilities", None, "list_multipart_uploads", {"MaxUploads": 1})
        except StorageRefused as error:
            # How rclone says that there are none.
            return error.reason == "no_such_upload"
        return True

    async def _uploads_page(self, parameters: dict[str, str]) -> Answer:
        async def attempt(_: Attempt) -> Answer:
            try:
                return await self._calls.send("list_uploads", None, "list_multipart_uploads", parameters)
            except StorageRefused as error:
                # How rclone says that there are none.
                if error.reason != "no_such_upload":
                    raise
                return {}

        return await self._resilience.call("list_uploads", attempt)


def _pending(entry: Answer) -> PendingUpload:
    return PendingUpload(entry["Key"], entry["UploadId"], entry["Initiated"].astimezone(UTC))
