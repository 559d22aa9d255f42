"""Adapters that were brought in from elsewhere: a file, then its manifest.

The manifest is written last and removed first, so an adapter is whole or does not exist; the sweeper takes a file that
has none. Until it is verified, its upload lies in staging beside a request that says what was promised. Works over any
ObjectStore; knows nothing of what is in the file.
"""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import ClassVar

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from storage.errors import ObjectNotFound, StorageError
from storage.keys import MANIFEST_NAME, Keys
from storage.objects import ObjectStore
from storage.ray_counters import note_cleanup_failure

IMPORTED_ID_PATTERN = r"^lora_[0-9a-f]{12}$"
SHA256_PATTERN = r"^[0-9a-f]{64}$"
REQUEST_NAME = "import.json"


class ImportedLoraNotFound(StorageError):
    """No adapter, or no import under way, has this id."""

    code: ClassVar[str] = "lora_not_found"

    def __init__(self, lora_id: str) -> None:
        super().__init__("there is no such adapter", lora_id)
        self.lora_id = lora_id


class LoraImport(BaseModel):
    """An import under way. What is known of the file before it came; `sha256` in hex where it was promised."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str = Field(pattern=IMPORTED_ID_PATTERN)
    name: str
    filename: str
    size_bytes: int = Field(gt=0)
    sha256: str | None = Field(default=None, pattern=SHA256_PATTERN)
    base_model: str | None = None
    trigger_word: str | None = None
    created_at: AwareDatetime


class ImportedLora(BaseModel):
    """A verified adapter. `rank` is the largest of its layers', `warnings` what was taken for granted of the file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int = 1
    id: str = Field(pattern=IMPORTED_ID_PATTERN)
    name: str
    filename: str
    key: str
    size_bytes: int
    sha256: str = Field(pattern=SHA256_PATTERN)
    format: str
    rank: int
    base_model: str | None = None
    trigger_word: str | None = None
    created_at: AwareDatetime
    warnings: tuple[str, ...] = ()


def new_lora_id() -> str:
    return f"lora_{secrets.token_hex(6)}"


def staged_file(keys: Keys, asked: LoraImport) -> str:
    return keys.staging_file(asked.id, asked.filename)


async def write_import(store: ObjectStore, keys: Keys, asked: LoraImport) -> None:
    body = asked.model_dump_json().encode()
    await store.put(keys.staging_file(asked.id, REQUEST_NAME), body, content_type="application/json")


async def read_import(store: ObjectStore, keys: Keys, lora_id: str) -> LoraImport:
    """Raises ImportedLoraNotFound."""
    try:
        return LoraImport.model_validate_json(await store.get(keys.staging_file(lora_id, REQUEST_NAME)))
    except (ObjectNotFound, ValidationError):
        raise ImportedLoraNotFound(lora_id) from None


async def commit_imported(store: ObjectStore, keys: Keys, asked: LoraImport, lora: ImportedLora, path: Path) -> None:
    """Make a verified file into an adapter. From the manifest on it exists; then staging is emptied, and what stays
    there is counted and left to the sweeper.

    The local bytes that were checked are stored, not the staged ones: their presigned URL may still be valid.
    """
    await store.upload_file(path, lora.key)
    body = lora.model_dump_json(indent=1).encode()
    await store.put(keys.imported_lora_manifest(lora.id), body, content_type="application/json")
    try:
        await store.delete_many([staged_file(keys, asked), keys.staging_file(asked.id, REQUEST_NAME)])
    except StorageError as error:
        note_cleanup_failure("staging", error.code)


async def read_imported(store: ObjectStore, keys: Keys, lora_id: str) -> ImportedLora:
    """Raises ImportedLoraNotFound."""
    try:
        return ImportedLora.model_validate_json(await store.get(keys.imported_lora_manifest(lora_id)))
    except (ObjectNotFound, ValidationError):
        raise ImportedLoraNotFound(lora_id) from None


async def list_imported(store: ObjectStore, keys: Keys) -> list[ImportedLora]:
    """Newest first."""
    prefix = keys.loras_prefix()
    found = []
    for info in await store.list(prefix):
        lora_id, _, name = info.key.removeprefix(prefix).partition("/")
        if name == MANIFEST_NAME:
            found.append(await read_imported(store, keys, lora_id))
    return sorted(found, key=lambda lora: (lora.created_at, lora.id), reverse=True)


async def delete_imported(store: ObjectStore, keys: Keys, lora_id: str) -> None:
    """Without its manifest the adapter is gone; a file that cannot be removed is counted and left to the sweeper.

    Raises ImportedLoraNotFound.
    """
    lora = await read_imported(store, keys, lora_id)
    await store.delete(keys.imported_lora_manifest(lora_id))
    try:
        await store.delete(lora.key)
    except StorageError as error:
        note_cleanup_failure("imported_adapter", error.code)
