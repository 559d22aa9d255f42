"""Stored files by key or by path: `list_files`, `download_by_key`, `download_file`, `list_dataset_folders`.

A key of another tenant and one that does not exist are the same here: not found.
"""

from __future__ import annotations

import base64
import mimetypes
from collections.abc import AsyncIterator
from pathlib import PurePosixPath
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from serve_app.job_types.context import Finished, JobContext, Services
from serve_app.job_types.files import redirect_item, url_item
from serve_app.job_types.recorded import recorded_sha256
from serve_app.validation.validator import parse_payload
from storage.errors import InvalidKey, ObjectNotFound
from storage.keys import Keys, check_key
from storage.objects import ObjectInfo
from storage.older_layout import readable_folders

MIB = 1024 * 1024
INLINE_BYTES_MAX = 5 * MIB
LIST_BATCH = 1000
LORA_SUFFIX = ".safetensors"
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp"})
DEFAULT_CONTENT_TYPE = "application/octet-stream"


class KeyChoice(BaseModel):
    model_config = ConfigDict(extra="allow")

    s3_key: str = Field(min_length=1, max_length=1200)


class FileChoice(BaseModel):
    model_config = ConfigDict(extra="allow")

    file_path: str = Field(min_length=1, max_length=1200)


class FolderChoice(BaseModel):
    model_config = ConfigDict(extra="allow")

    path: str | None = Field(default=None, max_length=1200)


async def download_by_key(services: Services, context: JobContext, payload: dict[str, Any]) -> Finished:
    """Raises InvalidRequest, ObjectNotFound, StorageError."""
    key = readable_key(services, context.tenant, parse_payload(KeyChoice, payload).s3_key)
    info = await services.store.head(key)
    return Finished({**url_item(_stored(info)), "s3_key": key})


async def download_file(services: Services, context: JobContext, payload: dict[str, Any]) -> Finished:
    """The bytes themselves where they are few, else where to get them. Raises InvalidRequest, ObjectNotFound,
    CheckpointInvalid, JobError, StorageError.
    """
    key = readable_key(services, context.tenant, parse_payload(FileChoice, payload).file_path)
    info = await services.store.head(key)
    content_type = info.content_type or mimetypes.guess_type(key)[0] or DEFAULT_CONTENT_TYPE
    recorded = await recorded_sha256(services, context.tenant, key) if key.endswith(LORA_SUFFIX) else None
    if info.size_bytes > INLINE_BYTES_MAX:
        stored = {**_stored(info), "sha256": recorded or info.sha256, "content_type": content_type}
        return Finished(redirect_item(stored))
    data = await services.store.get(key, expected_sha256=recorded)
    return Finished(
        {
            "type": "file_data",
            "filename": _name(key),
            "data": base64.b64encode(data).decode(),
            "size": len(data),
            "content_type": content_type,
        }
    )


async def list_files(services: Services, context: JobContext, payload: dict[str, Any]) -> Finished:
    """Adapters and pictures below `path`, or of all processes. Raises InvalidRequest, ObjectNotFound, StorageError."""
    keys = services.keys_of(context.tenant)
    prefixes = _readable_prefixes(services, keys, parse_payload(FolderChoice, payload).path)
    loras: list[dict[str, Any]] = []
    images: list[dict[str, Any]] = []
    for prefix in prefixes:
        async for info in all_below(services, prefix):
            suffix = PurePosixPath(info.key).suffix.lower()
            if info.key.startswith(keys.stagings_prefix()):
                continue
            if suffix == LORA_SUFFIX and "/checkpoints/" not in info.key:
                loras.append(_listed(keys, info))
            elif suffix in IMAGE_SUFFIXES:
                images.append(_listed(keys, info))
    return Finished({"lora_files": loras, "image_files": images, "total_files": len(loras) + len(images)})


async def list_dataset_folders(services: Services, context: JobContext, payload: dict[str, Any]) -> Finished:
    keys = services.keys_of(context.tenant)
    return Finished({"folders": await readable_folders(services.store, keys), "prefix": keys.datasets_prefix()})


async def all_below(services: Services, prefix: str) -> AsyncIterator[ObjectInfo]:
    """Every object below a prefix, in key order, a page at a time."""
    after: str | None = None
    while True:
        page = await services.store.list(prefix, start_after=after, limit=LIST_BATCH)
        for info in page:
            yield info
        if len(page) < LIST_BATCH:
            return
        after = page[-1].key


def readable_key(services: Services, tenant: str, named: str) -> str:
    """The key that a client named: whole, as `s3://<bucket>/<key>`, or relative to its own folder.

    Raises ObjectNotFound for anything outside of what it may read.
    """
    keys = services.keys_of(tenant)
    key = named.removeprefix(f"s3://{services.bucket}/")
    key = key if keys.may_read(key) else keys.tenant_prefix + key
    if not keys.may_read(key):
        raise ObjectNotFound(named)
    return key


def _readable_prefixes(services: Services, keys: Keys, path: str | None) -> tuple[str, ...]:
    """Raises ObjectNotFound."""
    if not path or not path.strip("/"):
        return (f"{keys.tenant_prefix}processes/", *keys.older_results_prefixes())
    key = readable_key(services, keys.tenant, path.rstrip("/"))
    try:
        return (f"{check_key(key)}/",)
    except InvalidKey:
        raise ObjectNotFound(path) from None


def _stored(info: ObjectInfo) -> dict[str, Any]:
    return {"key": info.key, "filename": _name(info.key), "size_bytes": info.size_bytes}


def _listed(keys: Keys, info: ObjectInfo) -> dict[str, Any]:
    path = info.key.removeprefix(keys.tenant_prefix)
    parts = path.split("/")
    return {
        "filename": _name(info.key),
        "path": path,
        "s3_key": info.key,
        "size": info.size_bytes,
        "modified_date": None if info.modified_at is None else info.modified_at.isoformat(),
        "process_id": parts[1] if parts[0] == "processes" and len(parts) > 1 else None,
    }


def _name(key: str) -> str:
    return key.rsplit("/", 1)[-1]
