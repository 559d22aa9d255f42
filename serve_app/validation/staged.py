"""Training data sent past the payload limit: presigned PUTs into staging keys, then a look at what really arrived.

What was promised is kept beside the staged files. A dataset exists from the end of `finalize` on, whose files are new
objects made of the bytes that were checked: a presigned URL that is still valid can change nothing of it.
"""

from __future__ import annotations

import asyncio
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from pydantic import ValidationError

from serve_app.collaborators import Clock
from serve_app.errors import InvalidRequest, UploadNotFound
from serve_app.links import Link
from serve_app.validation.archives import unpack
from serve_app.validation.dataset_reply import dataset_reply
from serve_app.validation.file_checks import (
    EXTENSIONS,
    FILE_BYTES_MAX,
    IMAGE_TYPES,
    OVER_TOTAL,
    TEXT_TYPES,
    TOTAL_BYTES_MAX,
    CheckedFile,
    FileProblem,
    FoundFile,
    check_files,
    check_names,
    extension_of,
    notes_on,
)
from serve_app.validation.payloads import CreateUploadPayload, FinalizePayload, StagedFile
from serve_app.validation.uploads import DatasetUploads
from serve_app.validation.validator import parse_payload, unknown_fields
from storage.datasets import DatasetNotFound, latest_manifest, new_upload_id
from storage.errors import ObjectNotFound, StorageError
from storage.keys import Keys
from storage.objects import ObjectStore
from storage.ray_counters import note_cleanup_failure
from train_jobs.errors import Problem

ZIP = "zip"
CONTENT_TYPES = {**IMAGE_TYPES, **TEXT_TYPES, ZIP: "application/zip"}
OVER_SIZE = f"is over {FILE_BYTES_MAX // 2**20} MB; only a {ZIP} may be larger"
STAGED_KEPT = timedelta(hours=24)
UPLOAD_ID = re.compile(r"(\d{8}T\d{12}Z)-[0-9a-f]{8}")


class StagedUploads:
    """`uploads` makes the dataset once everything was checked."""

    def __init__(
        self,
        store: ObjectStore,
        keys_of: Callable[[str], Keys],
        bucket: str,
        clock: Clock,
        uploads: DatasetUploads,
        *,
        url_expires_s: int,
    ) -> None:
        self._store = store
        self._keys_of = keys_of
        self._bucket = bucket
        self._clock = clock
        self._uploads = uploads
        self._url_expires_s = url_expires_s
        # Kept by those that finalize.
        self._at_work: WeakValueDictionary[tuple[str, str], asyncio.Lock] = WeakValueDictionary()

    async def create(self, tenant: str, payload: dict[str, Any]) -> dict[str, Any]:
        """A link for each file, and the token to finalize with. Raises InvalidRequest, StorageError.

        Uploads of this tenant that were never finalized are removed a day after they were created.
        """
        request = parse_payload(CreateUploadPayload, payload)
        _check_promises(request.files)
        keys, now = self._keys_of(tenant), self._clock()
        await self._remove_abandoned(keys, now)
        upload_id = new_upload_id(now)
        await self._store.put(
            keys.staging_manifest(upload_id), request.model_dump_json().encode(), content_type="application/json"
        )
        return {
            "message": "PUT each file to its url with the headers shown, then finalize_upload with the token",
            "upload_id": upload_id,
            "token": upload_id,
            "training_name": request.training_name,
            "dataset_folder": request.folder,
            "expires_at": (now + timedelta(seconds=self._url_expires_s)).isoformat(),
            "files": [_place_for(keys, upload_id, file) for file in request.files],
            "warnings": list(unknown_fields(request)),
        }

    async def finalize(self, tenant: str, payload: dict[str, Any]) -> dict[str, Any]:
        """Check what arrived and make it a dataset; the same reply for the same token, however often it is asked.

        Raises UploadNotFound, InvalidRequest with every problem found, StorageError.
        """
        token = parse_payload(FinalizePayload, payload).token
        keys = self._keys_of(tenant)
        request = await self._promised(keys, token)
        # Two at once would write the same objects, the second while a training may be reading the first's. Those at two
        # replicas still can. Of the same staged bytes they make the same objects, so that whichever manifest stays is
        # true; where a file was sent anew between them it may not be, and every read of the data set, which is held to
        # the manifest's digests, refuses the bytes that are not its own.
        async with self._at_work.setdefault((tenant, token), asyncio.Lock()):
            reply = await self._made(keys, request, token) or await self._make(tenant, keys, request, token)
        try:
            await self._store.delete_many([keys.staging_file(token, file.filename) for file in request.files])
        except StorageError as error:
            # The data set is there; the sweeper takes what is left of its upload.
            note_cleanup_failure("staging", error.code)
        return reply

    async def _made(self, keys: Keys, request: CreateUploadPayload, token: str) -> dict[str, Any] | None:
        """The reply of a data set that exists already; None where it does not."""
        try:
            manifest = await latest_manifest(self._store, keys, request.folder, upload_id=token)
        except DatasetNotFound:
            return None
        return dataset_reply(manifest, keys, self._bucket)

    async def _make(self, tenant: str, keys: Keys, request: CreateUploadPayload, token: str) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(prefix="raylora-staged-") as name:
            folder = Path(name)
            arrived, problems = await self._fetch(keys, request, token, folder)
            checked = None if problems else await asyncio.to_thread(_checked, arrived, folder)
            # The same request at another replica may have made it meanwhile, and removed what was staged.
            made = await self._made(keys, request, token)
            if made is not None:
                return made
            if checked is None:
                raise InvalidRequest(problems)
            files, notes = checked
            return await self._uploads.commit(tenant, request, token, files, [*notes, *notes_on(files)])

    async def _fetch(
        self, keys: Keys, request: CreateUploadPayload, token: str, folder: Path
    ) -> tuple[list[FoundFile], list[Problem]]:
        found: list[FoundFile] = []
        problems: list[Problem] = []
        for index, file in enumerate(request.files):
            place = f"files[{index}]"
            try:
                path = await self._fetch_one(keys.staging_file(token, file.filename), file, folder / f"staged-{index}")
            except FileProblem as problem:
                problems.append(problem.at(place))
            else:
                found.append(FoundFile(place, file.filename, path))
        return found, problems

    async def _fetch_one(self, key: str, file: StagedFile, path: Path) -> Path:
        """Raises FileProblem, StorageError."""
        try:
            size_bytes = (await self._store.head(key)).size_bytes
            # Before the download: a PUT by presigned URL may bring any number of bytes.
            if size_bytes != file.size:
                raise FileProblem("size", f"{size_bytes} bytes arrived instead of {file.size}", "invalid_value")
            info = await self._store.download_file(key, path)
        except ObjectNotFound:
            raise FileProblem("", "was not uploaded", "missing") from None
        if file.sha256 is not None and info.sha256 != file.sha256:
            raise FileProblem("sha256", "the bytes that arrived have another sha256", "invalid_value")
        return path

    async def _promised(self, keys: Keys, token: str) -> CreateUploadPayload:
        """Raises UploadNotFound."""
        if not UPLOAD_ID.fullmatch(token):
            raise UploadNotFound
        try:
            body = await self._store.get(keys.staging_manifest(token))
            return CreateUploadPayload.model_validate_json(body)
        except (ObjectNotFound, ValidationError):
            raise UploadNotFound from None

    async def _remove_abandoned(self, keys: Keys, now: datetime) -> None:
        prefix = keys.stagings_prefix()
        old = [
            info.key
            for info in await self._store.list(prefix)
            if _is_abandoned(info.key.removeprefix(prefix).split("/")[0], now)
        ]
        if old:
            await self._store.delete_many(old)


def is_over_size(filename: str, size_bytes: int) -> bool:
    """Whether this file is larger than one may be. What is in a zip is judged when it is unpacked."""
    return size_bytes > FILE_BYTES_MAX and extension_of(filename) != ZIP


def _check_promises(files: Sequence[StagedFile]) -> None:
    """Raises InvalidRequest for what can be known to be wrong before anything was sent."""
    names = [file.filename for file in files]
    problems = [
        problem.at(f"files[{index}]")
        for index, problem in enumerate(check_names(names, (*EXTENSIONS, ZIP)))
        if problem is not None
    ]
    if sum(file.size for file in files) > TOTAL_BYTES_MAX:
        problems.append(Problem("files", OVER_TOTAL, "too_large"))
    for index, file in enumerate(files):
        if is_over_size(file.filename, file.size):
            problems.append(Problem(f"files[{index}].size", OVER_SIZE, "too_large"))
        offered = CONTENT_TYPES.get(extension_of(file.filename))
        if file.content_type is not None and offered is not None and file.content_type != offered:
            problems.append(Problem(f"files[{index}].content_type", f"must be {offered}", "invalid_value"))
    if problems:
        raise InvalidRequest(problems)


def _checked(arrived: Sequence[FoundFile], folder: Path) -> tuple[list[CheckedFile], list[str]]:
    """With the zips unpacked, and notes on them. Blocking. Raises InvalidRequest."""
    found: list[FoundFile] = []
    notes: list[str] = []
    problems: list[Problem] = []
    left_bytes = TOTAL_BYTES_MAX
    for index, file in enumerate(arrived):
        if extension_of(file.filename) != ZIP:
            found.append(file)
            continue
        target = folder / f"unpacked-{index}"
        target.mkdir()
        inside = unpack(file.path, target, file.place, bytes_max=left_bytes, shown_name=file.filename)
        left_bytes -= sum(item.path.stat().st_size for item in inside.files)
        found += inside.files
        notes += inside.notes
        problems += inside.problems
    if problems:
        raise InvalidRequest(problems)
    files, problems = check_files(found)
    if problems:
        # Of a zip with no usable picture, what was left out is the reason.
        raise InvalidRequest([_with_notes(problem, notes) for problem in problems])
    return files, notes


def _with_notes(problem: Problem, notes: Sequence[str]) -> Problem:
    if problem.path != "files" or not notes:
        return problem
    return replace(problem, message=". ".join([problem.message, *notes]))


def _is_abandoned(upload_id: str, now: datetime) -> bool:
    made = UPLOAD_ID.fullmatch(upload_id)
    if made is None:
        return False
    return datetime.strptime(made[1], "%Y%m%dT%H%M%S%fZ").replace(tzinfo=UTC) + STAGED_KEPT <= now


def _place_for(keys: Keys, upload_id: str, file: StagedFile) -> dict[str, Any]:
    content_type = CONTENT_TYPES[extension_of(file.filename)]
    url = Link(keys.staging_file(upload_id, file.filename), "PUT", content_type=content_type)
    return {"filename": file.filename, "method": "PUT", "url": url, "headers": {"Content-Type": content_type}}
