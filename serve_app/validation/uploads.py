"""Training data sent inside a request: checked file by file, then stored as one dataset or not at all."""

from __future__ import annotations

import asyncio
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve_app.collaborators import Clock
from serve_app.errors import InvalidRequest
from serve_app.outbound import Outbound
from serve_app.validation.dataset_reply import dataset_reply
from serve_app.validation.file_checks import (
    OVER_TOTAL,
    TOTAL_BYTES_MAX,
    CheckedFile,
    FileProblem,
    FoundFile,
    check_files,
    notes_on,
)
from serve_app.validation.payloads import DatasetFields, UploadFile, UploadPayload
from serve_app.validation.sources import OverTotal, Total, decoded_content, fetch_file
from serve_app.validation.validator import parse_payload, unknown_fields
from storage.datasets import DatasetManifest, DatasetNotFound, latest_manifest, new_upload_id, write_dataset
from storage.keys import Keys
from storage.objects import ObjectStore
from train_jobs.errors import Problem

FETCHES_AT_ONCE = 8


@dataclass(frozen=True)
class CheckedUpload:
    request: UploadPayload
    files: tuple[CheckedFile, ...]
    warnings: tuple[str, ...]


def check_upload(request: UploadPayload, folder: Path, fetched: Mapping[int, FileProblem | None]) -> CheckedUpload:
    """Decode every file into `folder`, where those that came by URL are already, and check it.

    Raises InvalidRequest with the problems of all of them. Blocking, and slow: not for an event loop.
    """
    problems: list[Problem] = []
    found: list[FoundFile] = []
    for index, item in enumerate(request.files):
        place = f"files[{index}]"
        path = folder / str(index)
        try:
            _bring(item, path, fetched.get(index))
        except FileProblem as problem:
            problems.append(problem.at(place))
        else:
            found.append(FoundFile(place, item.filename, path))
    files, more = check_files(found)
    # A file without its bytes may have been the only picture, so that this is known only of what could be read.
    more = [problem for problem in more if not (problems and problem.path == "files")]
    if problems or more:
        raise InvalidRequest(sorted([*problems, *more], key=_place))
    return CheckedUpload(request, tuple(files), (*unknown_fields(request), *notes_on(files)))


def _place(problem: Problem) -> int:
    number = re.match(r"files\[(\d+)\]", problem.path)
    return int(number[1]) if number else -1


def _refuse_two_sources(request: UploadPayload) -> None:
    """Before anything is fetched. Raises InvalidRequest."""
    both = [index for index, item in enumerate(request.files) if item.content is not None and item.url is not None]
    if both:
        message = "there is a url too: send the bytes as content, or the url, not both"
        raise InvalidRequest(Problem(f"files[{index}].content", message, "invalid_value") for index in both)


def _bring(item: UploadFile, path: Path, fetching: FileProblem | None) -> None:
    """Raises FileProblem."""
    if fetching is not None:
        raise fetching
    if item.content is None and item.url is None:
        raise FileProblem("content", "is missing: give the bytes as content, or an https url", "missing")
    if item.content is not None:
        path.write_bytes(decoded_content(item.content))


class DatasetUploads:
    """Stores checked uploads. The manifest goes last, so a failed upload leaves the dataset as it was.

    Earlier uploads of the folder stay stored, because a training that is under way may be reading them; with
    `cleanup_existing` they are no longer part of the dataset, without it their files are.
    """

    def __init__(
        self, store: ObjectStore, keys_of: Callable[[str], Keys], bucket: str, clock: Clock, outbound: Outbound
    ) -> None:
        self._outbound = outbound
        self._store = store
        self._keys_of = keys_of
        self._bucket = bucket
        self._clock = clock

    async def store(self, tenant: str, payload: dict[str, Any]) -> dict[str, Any]:
        """Raises InvalidRequest, StorageError. Returns the fields of the reply."""
        with tempfile.TemporaryDirectory(prefix="raylora-upload-") as folder:
            request = parse_payload(UploadPayload, payload)
            _refuse_two_sources(request)
            fetched = await self._fetch(request, Path(folder))
            upload = await asyncio.to_thread(check_upload, request, Path(folder), fetched)
            upload_id = new_upload_id(self._clock())
            return await self.commit(tenant, upload.request, upload_id, upload.files, upload.warnings)

    async def _fetch(self, request: UploadPayload, folder: Path) -> dict[int, FileProblem | None]:
        """Get the files that are named by URL, into `folder` under their numbers; what went wrong with each.

        Raises InvalidRequest as soon as they are too much together, with nothing under way any more.
        """
        places, total = asyncio.Semaphore(FETCHES_AT_ONCE), Total(TOTAL_BYTES_MAX)

        async def fetch(index: int, url: str) -> FileProblem | None:
            async with places:
                total.check()
                try:
                    await fetch_file(self._outbound, url, folder / str(index), total)
                except FileProblem as problem:
                    return problem
            return None

        named = {index: item.url for index, item in enumerate(request.files) if item.url is not None}
        fetches = [asyncio.create_task(fetch(index, url)) for index, url in named.items()]
        try:
            return dict(zip(named, await asyncio.gather(*fetches), strict=True))
        except OverTotal:
            raise InvalidRequest([Problem("files", OVER_TOTAL, "too_large")]) from None
        finally:
            for task in fetches:
                task.cancel()
            # The folder goes next.
            await asyncio.gather(*fetches, return_exceptions=True)

    async def commit(
        self,
        tenant: str,
        fields: DatasetFields,
        upload_id: str,
        files: Sequence[CheckedFile],
        warnings: Sequence[str],
    ) -> dict[str, Any]:
        """Make checked files a dataset. Raises StorageError; the dataset is then as before."""
        keys = self._keys_of(tenant)
        manifest = await write_dataset(
            self._store,
            keys,
            fields.folder,
            [(file.filename, file.path, file.content_type) for file in files],
            now=self._clock(),
            upload_id=upload_id,
            training_name=fields.training_name,
            trigger_word=fields.trigger_word,
            base=None if fields.cleanup_existing else await self._earlier(keys, fields.folder),
            notes=warnings,
        )
        return dataset_reply(manifest, keys, self._bucket)

    async def _earlier(self, keys: Keys, folder: str) -> DatasetManifest | None:
        try:
            return await latest_manifest(self._store, keys, folder)
        except DatasetNotFound:
            return None
