"""Datasets in the object store: files, then a manifest.

An upload is its manifest: it is written last, so a dataset either has all its files or does not exist. Uploads are
never changed; a new one gets a later id, and the newest wins. Works over any ObjectStore.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import mimetypes
import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from storage.bounded import run_bounded
from storage.digests import sha256_file
from storage.errors import ObjectNotFound, StorageError
from storage.keys import MANIFEST_NAME, Keys
from storage.objects import ObjectStore, PutItem
from storage.settings import MIB

logger = logging.getLogger(__name__)

# Files up to this size are stored as bytes, a batch at the same time.
SMALL_FILE_BYTES = 2 * MIB
# Together they bound what is under way to the storage actor.
BATCH_FILES = 64
BATCH_BYTES = 16 * MIB
BATCHES_AT_ONCE = 4


class DatasetNotFound(StorageError):
    """No finished upload of this dataset."""

    code: ClassVar[str] = "dataset_not_found"

    def __init__(self, folder: str) -> None:
        super().__init__("there is no such dataset", folder)
        self.folder = folder


class DatasetManifestInvalid(StorageError):
    """A manifest exists and cannot be read as one."""

    code: ClassVar[str] = "dataset_manifest_invalid"

    def __init__(self, folder: str) -> None:
        super().__init__("the dataset's manifest cannot be read", folder)
        self.folder = folder


class DatasetNotStored(StorageError):
    """Some files could not be stored, so there is no upload; the data set is as it was before.

    `failures` are (filename, code of the error), `retry_after_s` is when sending it again makes sense, where known.
    """

    code: ClassVar[str] = "dataset_not_stored"

    def __init__(self, folder: str, failures: tuple[tuple[str, str], ...], retry_after_s: float | None) -> None:
        super().__init__(f"{len(failures)} files could not be stored", folder, failures, retry_after_s)
        self.folder = folder
        self.failures = failures
        self.retry_after_s = retry_after_s


class DatasetFile(BaseModel):
    """One stored file; `sha256` in hex. The key may belong to an earlier upload of the same dataset."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    filename: str
    key: str
    size_bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    content_type: str | None = None


class DatasetManifest(BaseModel):
    """What one upload of a dataset holds. `notes` are what its sender was told about it, for when they ask again."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    folder: str
    upload_id: str
    training_name: str | None = None
    trigger_word: str | None = None
    created_at: AwareDatetime
    files: tuple[DatasetFile, ...]
    notes: tuple[str, ...] = ()

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)


@dataclass(frozen=True)
class FileOutcome:
    """`error`: why it was not stored; only then there is no `file`."""

    filename: str
    file: DatasetFile | None = None
    error: StorageError | None = None


def new_upload_id(now: datetime) -> str:
    """A sortable id: UTC to the microsecond and 32 random bits, so that later uploads have greater ids."""
    return f"{now.astimezone(UTC):%Y%m%dT%H%M%S%fZ}-{secrets.token_hex(4)}"


async def write_dataset(
    store: ObjectStore,
    keys: Keys,
    folder: str,
    files: Sequence[tuple[str, bytes | Path, str | None]],
    *,
    now: datetime,
    upload_id: str | None = None,
    training_name: str | None = None,
    trigger_word: str | None = None,
    base: DatasetManifest | None = None,
    notes: Sequence[str] = (),
) -> DatasetManifest:
    """Store `files` as (filename, bytes or a local path, content type), then the manifest.

    `base` is an earlier upload whose files stay part of the dataset unless a new one has their name. Raises
    DatasetNotStored, naming every file that failed, or another StorageError; then no manifest was written and the
    dataset is as before.
    """
    upload = upload_id or new_upload_id(now)
    batches = (_store_batch(store, keys, folder, upload, batch) for batch in _batches(files))
    outcomes = [outcome for batch in await run_bounded(batches, BATCHES_AT_ONCE) for outcome in batch]
    errors = {outcome.filename: outcome.error for outcome in outcomes if outcome.error is not None}
    if errors:
        waits_s = [error.retry_after_s or 0.0 for error in errors.values()]
        failures = tuple((name, error.code) for name, error in errors.items())
        logger.warning("%d of %d files of an upload were not stored (%s)", len(errors), len(files), failures[0][1])
        raise DatasetNotStored(folder, failures, max(waits_s) or None)
    stored = [outcome.file for outcome in outcomes if outcome.file is not None]
    return await commit_manifest(
        store,
        keys,
        folder,
        stored,
        now=now,
        upload_id=upload,
        training_name=training_name,
        trigger_word=trigger_word,
        base=base,
        notes=notes,
    )


async def commit_manifest(
    store: ObjectStore,
    keys: Keys,
    folder: str,
    files: Iterable[DatasetFile],
    *,
    now: datetime,
    upload_id: str,
    training_name: str | None = None,
    trigger_word: str | None = None,
    base: DatasetManifest | None = None,
    notes: Sequence[str] = (),
) -> DatasetManifest:
    """Make files that are already stored into an upload of the dataset. From here on it exists."""
    merged = {file.filename: file for file in (base.files if base else ())} | {f.filename: f for f in files}
    manifest = DatasetManifest(
        folder=folder,
        upload_id=upload_id,
        training_name=training_name,
        trigger_word=trigger_word,
        created_at=now,
        files=tuple(merged[name] for name in sorted(merged)),
        notes=tuple(notes),
    )
    body = manifest.model_dump_json(indent=1).encode()
    await store.put(keys.dataset_manifest(folder, upload_id), body, content_type="application/json")
    return manifest


async def latest_manifest(
    store: ObjectStore, keys: Keys, folder: str, *, upload_id: str | None = None
) -> DatasetManifest:
    """The newest finished upload, or the one asked for. Raises DatasetNotFound, DatasetManifestInvalid."""
    if upload_id is None:
        uploads = await _uploads(store, keys, folder)
        if not uploads:
            raise DatasetNotFound(folder)
        upload_id = uploads[-1]
    try:
        body = await store.get(keys.dataset_manifest(folder, upload_id))
    except ObjectNotFound:
        raise DatasetNotFound(folder) from None
    return parse_manifest(folder, body)


def parse_manifest(folder: str, body: bytes) -> DatasetManifest:
    """Raises DatasetManifestInvalid."""
    try:
        return DatasetManifest.model_validate_json(body)
    except ValidationError:
        raise DatasetManifestInvalid(folder) from None


async def dataset_folders(store: ObjectStore, keys: Keys) -> list[str]:
    """Every dataset with a finished upload, by name."""
    prefix = keys.datasets_prefix()
    found = {
        parts[0]
        for info in await store.list(prefix)
        if len(parts := info.key.removeprefix(prefix).split("/")) == 3 and parts[2] == MANIFEST_NAME
    }
    return sorted(found)


async def delete_other_uploads(store: ObjectStore, keys: Keys, manifest: DatasetManifest) -> int:
    """Delete the uploads older than `manifest` but not the files it refers to. Returns how many objects went.

    Manifests go first: a reader sees a whole upload or none. Newer uploads, finished or under way, are left alone.
    """
    prefix = keys.dataset_manifests_prefix(manifest.folder)
    kept = {file.key for file in manifest.files}
    doomed = [
        info.key
        for info in await store.list(prefix)
        if info.key not in kept and info.key.removeprefix(prefix).split("/")[0] < manifest.upload_id
    ]
    manifests = [key for key in doomed if key.endswith(f"/{MANIFEST_NAME}")]
    files = [key for key in doomed if not key.endswith(f"/{MANIFEST_NAME}")]
    return sum([await store.delete_many(group) for group in (manifests, files) if group])


async def referenced_keys(store: ObjectStore, keys: Keys, folder: str) -> set[str]:
    """Keys of all files that a manifest of this dataset names. Raises DatasetManifestInvalid rather than miss some."""
    named: set[str] = set()
    for upload_id in await _uploads(store, keys, folder):
        manifest = await latest_manifest(store, keys, folder, upload_id=upload_id)
        named |= {file.key for file in manifest.files}
    return named


async def _uploads(store: ObjectStore, keys: Keys, folder: str) -> list[str]:
    prefix = keys.dataset_manifests_prefix(folder)
    parts = [info.key.removeprefix(prefix).split("/") for info in await store.list(prefix)]
    return sorted(p[0] for p in parts if len(p) == 2 and p[1] == MANIFEST_NAME)


def _batches(
    files: Sequence[tuple[str, bytes | Path, str | None]],
) -> Iterator[list[tuple[str, bytes | Path, str | None]]]:
    """In order, bounded by number and by the bytes that pass through memory here."""
    batch: list[tuple[str, bytes | Path, str | None]] = []
    size_bytes = 0
    for file in files:
        weight = _weight(file[1])
        if batch and (len(batch) == BATCH_FILES or size_bytes + weight > BATCH_BYTES):
            yield batch
            batch, size_bytes = [], 0
        batch.append(file)
        size_bytes += weight
    if batch:
        yield batch


def _weight(content: bytes | Path) -> int:
    """Large files go by their path: their bytes never pass here."""
    if isinstance(content, bytes):
        return len(content)
    size_bytes = content.stat().st_size
    return size_bytes if size_bytes <= SMALL_FILE_BYTES else 0


async def _store_batch(
    store: ObjectStore, keys: Keys, folder: str, upload_id: str, files: Sequence[tuple[str, bytes | Path, str | None]]
) -> list[FileOutcome]:
    """One for each file. Small files go together."""
    items: list[PutItem] = []
    small: list[DatasetFile] = []
    outcomes: list[FileOutcome] = []
    for filename, content, content_type in files:
        key = keys.dataset_file(folder, upload_id, filename)
        kind = content_type or mimetypes.guess_type(filename)[0]
        if isinstance(content, Path) and content.stat().st_size <= SMALL_FILE_BYTES:
            content = await asyncio.to_thread(content.read_bytes)
        if isinstance(content, Path):
            outcomes.append(await _store_large(store, filename, content, key, kind))
        else:
            items.append(PutItem(key, content, kind))
            small.append(_entry(filename, key, len(content), hashlib.sha256(content).hexdigest(), kind))
    results = await store.put_many(items) if items else []
    for file, result in zip(small, results, strict=True):
        stored = file if result.error is None else None
        outcomes.append(FileOutcome(file.filename, stored, result.error))
    return outcomes


async def _store_large(store: ObjectStore, filename: str, path: Path, key: str, kind: str | None) -> FileOutcome:
    try:
        info = await store.upload_file(path, key, content_type=kind)
    except StorageError as error:
        return FileOutcome(filename, error=error)
    sha256 = await asyncio.to_thread(sha256_file, path) if info.sha256 is None else info.sha256
    return FileOutcome(filename, _entry(filename, key, info.size_bytes, sha256, kind))


def _entry(filename: str, key: str, size_bytes: int, sha256: str, content_type: str | None) -> DatasetFile:
    return DatasetFile(filename=filename, key=key, size_bytes=size_bytes, sha256=sha256, content_type=content_type)
