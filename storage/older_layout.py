"""What the system before this one left in the bucket, made readable: its files stay where they are.

    <prefix>/dataset/<folder>/<filename>
    <prefix>/datasets/<training_name>/<filename>
    <prefix>/results/<subject>/{lora,samples,images}/<filename>

It knew no tenants, so all of this is of the tenant whose `Keys` have `reads_older`.
"""

from __future__ import annotations

import hashlib
import logging
import mimetypes
from datetime import datetime

from storage.bounded import run_bounded
from storage.datasets import (
    DatasetFile,
    DatasetManifest,
    DatasetNotFound,
    commit_manifest,
    dataset_folders,
    latest_manifest,
    new_upload_id,
)
from storage.errors import InvalidKey
from storage.keys import MANIFEST_NAME, Keys, check_filename
from storage.objects import ObjectInfo, ObjectStore

logger = logging.getLogger(__name__)

FILES_AT_ONCE = 4


async def readable_folders(store: ObjectStore, keys: Keys) -> list[str]:
    """Every data set that can be trained on, of either layout, by name."""
    found = set(await dataset_folders(store, keys))
    for prefix in keys.older_datasets_prefixes():
        parts = [info.key.removeprefix(prefix).split("/") for info in await store.list(prefix)]
        found |= {folder for folder, *names in parts if len(names) == 1 and _is_usable(names[0])}
    return sorted(found)


async def readable_manifest(store: ObjectStore, keys: Keys, folder: str, *, now: datetime) -> DatasetManifest:
    """The newest upload of a data set; where there is none, one of the older layout is made into one.

    Every file of that is read once, for its hash. Raises DatasetNotFound, DatasetManifestInvalid, StorageError.
    """
    try:
        return await latest_manifest(store, keys, folder)
    except DatasetNotFound:
        files = await _older_files(store, keys, folder)
        if not files:
            raise
    entries = await run_bounded((_entry(store, filename, info) for filename, info in files.items()), FILES_AT_ONCE)
    logger.info("a data set of the older layout was made into an upload of %d files", len(entries))
    return await commit_manifest(store, keys, folder, entries, now=now, upload_id=new_upload_id(now))


async def readable_kinds(store: ObjectStore, keys: Keys, folder: str) -> list[str | None]:
    """The content types of the files that `readable_manifest` would give; nothing is made. Raises like that."""
    try:
        return [file.content_type for file in (await latest_manifest(store, keys, folder)).files]
    except DatasetNotFound:
        files = await _older_files(store, keys, folder)
        if not files:
            raise
    return [_content_type(filename) for filename in files]


async def _older_files(store: ObjectStore, keys: Keys, folder: str) -> dict[str, ObjectInfo]:
    """By name, of the first of the older places that has any."""
    for prefix in keys.older_datasets_prefixes(folder):
        found = {info.key.removeprefix(prefix): info for info in await store.list(prefix)}
        if usable := {name: info for name, info in found.items() if _is_usable(name)}:
            return usable
    return {}


def _is_usable(filename: str) -> bool:
    try:
        return check_filename(filename).lower() != MANIFEST_NAME
    except InvalidKey:
        return False


async def _entry(store: ObjectStore, filename: str, info: ObjectInfo) -> DatasetFile:
    data = await store.get(info.key)
    return DatasetFile(
        filename=filename,
        key=info.key,
        size_bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        content_type=_content_type(filename),
    )


def _content_type(filename: str) -> str | None:
    return mimetypes.guess_type(filename)[0]
