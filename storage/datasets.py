"""Datasets in the object store: files, then a manifest.

An upload is its manifest: it is written last, so a dataset either has all its files or does not exist. Uploads are
never changed; a new one gets a later id, and the newest wins. Works over any ObjectStore.
"""

from __future__ import annotations

import asyncio
import hashlib
import mimetypes
import secrets
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from storage.errors import ObjectNotFound, StorageError
from storage.keys import MANIFEST_NAME, Keys
from storage.objects import ObjectStore, PutItem

BATCH_FILES = 32
# Files up to this size are stored as bytes, a batch at the same time.
SMALL_FILE_BYTES = 2 * 1024 * 1024


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


class DatasetFile(BaseModel):
    """One stored file; `sha256` in hex. The key may belong to an earlier upload of the same dataset."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    filename: str
    key: str
    size_bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    content_type: str | None = None


class DatasetManifest(BaseModel):
    """What one upload of a dataset holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    folder: str
    upload_id: str
    training_name: str | None = None
    trigger_word: str | None = None
    created_at: AwareDatetime
    files: tuple[DatasetFile, ...]

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)


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
) -> DatasetManifest:
    """Store `files` as (filename, bytes or a local path, content type), then the manifest.

    `base` is an earlier upload whose files stay part of the dataset unless a new one has their name. Raises
    StorageError; then no manifest was written and the dataset is as before.
    """
    upload = upload_id or new_upload_id(now)
    stored: list[DatasetFile] = []
    for start in range(0, len(files), BATCH_FILES):
        stored += await _store_batch(store, keys, folder, upload, files[start : start + BATCH_FILES])
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


async def _uploads(store: ObjectStore, keys: Keys, folder: str) -> list[str]:
    prefix = keys.dataset_manifests_prefix(folder)
    parts = [info.key.removeprefix(prefix).split("/") for info in await store.list(prefix)]
    return sorted(p[0] for p in parts if len(p) == 2 and p[1] == MANIFEST_NAME)


async def _store_batch(
    store: ObjectStore, keys: Keys, folder: str, upload_id: str, files: Sequence[tuple[str, bytes | Path, str | None]]
) -> list[DatasetFile]:
    items: list[PutItem] = []
    stored: list[DatasetFile] = []
    for filename, content, content_type in files:
        key = keys.dataset_file(folder, upload_id, filename)
        kind = content_type or mimetypes.guess_type(filename)[0]
        if isinstance(content, Path) and content.stat().st_size <= SMALL_FILE_BYTES:
            content = await asyncio.to_thread(content.read_bytes)
        if isinstance(content, Path):
            info = await store.upload_file(content, key, content_type=kind)
            sha256 = info.sha256
            if sha256 is None:
                sha256 = await asyncio.to_thread(_sha256_of, content)
            stored.append(_entry(filename, key, info.size_bytes, sha256, kind))
        else:
            items.append(PutItem(key, content, kind))
            stored.append(_entry(filename, key, len(content), hashlib.sha256(content).hexdigest(), kind))
    for outcome in await store.put_many(items) if items else []:
        if outcome.error is not None:
            raise outcome.error
    return stored


def _entry(filename: str, key: str, size_bytes: int, sha256: str, content_type: str | None) -> DatasetFile:
    return DatasetFile(filename=filename, key=key, size_bytes=size_bytes, sha256=sha256, content_type=content_type)


def _sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
