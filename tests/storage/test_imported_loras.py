"""Adapters from elsewhere, where the store fails in the midst of making or deleting one."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from storage.counters import CLEANUP_FAILURES
from storage.errors import StorageFailed
from storage.imported_loras import (
    ImportedLora,
    ImportedLoraNotFound,
    LoraImport,
    commit_imported,
    delete_imported,
    list_imported,
    read_imported,
    staged_file,
    write_import,
)
from storage.keys import Keys
from storage.ray_counters import of_this_process
from storage.testing import InMemoryStore

KEYS = Keys("raylora", "matt")
NOW = datetime(2026, 1, 1, tzinfo=UTC)
LORA_ID = "lora_0123456789ab"
FILE = b"weights"
ASKED = LoraImport(id=LORA_ID, name="paper", filename="a.safetensors", size_bytes=len(FILE), created_at=NOW)
LORA = ImportedLora(
    id=LORA_ID,
    name="paper",
    filename="a.safetensors",
    key=KEYS.imported_lora_file(LORA_ID, "a.safetensors"),
    size_bytes=len(FILE),
    sha256="0" * 64,
    format="kohya",
    rank=4,
    created_at=NOW,
)


@pytest.fixture
async def store(tmp_path: Path) -> InMemoryStore:
    """With an upload that has come and is to become an adapter."""
    store = InMemoryStore()
    (tmp_path / "file").write_bytes(FILE)
    await write_import(store, KEYS, ASKED)
    await store.put(staged_file(KEYS, ASKED), FILE)
    return store


def failed(operation: str) -> StorageFailed:
    return StorageFailed(operation, 4, "server_error")


def left_behind(resource: str) -> float:
    return of_this_process().counts().get(CLEANUP_FAILURES, {}).get(resource, 0.0)


async def test_an_upload_becomes_an_adapter_and_leaves_staging_empty(store: InMemoryStore, tmp_path: Path) -> None:
    await commit_imported(store, KEYS, ASKED, LORA, tmp_path / "file")

    assert await read_imported(store, KEYS, LORA_ID) == LORA
    assert set(store.keys()) == {LORA.key, KEYS.imported_lora_manifest(LORA_ID)}
    await delete_imported(store, KEYS, LORA_ID)
    assert store.keys() == []


async def test_an_adapter_exists_also_where_staging_cannot_be_emptied(store: InMemoryStore, tmp_path: Path) -> None:
    before = left_behind("staging")
    store.fail("delete_many", failed("delete_many"))

    await commit_imported(store, KEYS, ASKED, LORA, tmp_path / "file")

    assert await read_imported(store, KEYS, LORA_ID) == LORA
    assert left_behind("staging") == before + 1


@pytest.mark.parametrize("operation", ["upload_file", "put"])
async def test_what_fails_before_the_manifest_is_no_adapter_and_can_be_made_again(
    store: InMemoryStore, tmp_path: Path, operation: str
) -> None:
    store.fail(operation, failed(operation))

    with pytest.raises(StorageFailed):
        await commit_imported(store, KEYS, ASKED, LORA, tmp_path / "file")
    assert await list_imported(store, KEYS) == []

    await commit_imported(store, KEYS, ASKED, LORA, tmp_path / "file")
    assert await list_imported(store, KEYS) == [LORA]


async def test_an_adapter_whose_file_cannot_be_removed_is_gone_all_the_same(
    store: InMemoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await commit_imported(store, KEYS, ASKED, LORA, tmp_path / "file")
    before, delete = left_behind("imported_adapter"), store.delete

    async def delete_manifests_only(key: str) -> None:
        if key == LORA.key:
            raise failed("delete")
        await delete(key)

    monkeypatch.setattr(store, "delete", delete_manifests_only)
    await delete_imported(store, KEYS, LORA_ID)

    with pytest.raises(ImportedLoraNotFound):
        await read_imported(store, KEYS, LORA_ID)
    assert store.keys() == [LORA.key]
    assert left_behind("imported_adapter") == before + 1


async def test_where_the_manifest_stays_the_deletion_failed(store: InMemoryStore, tmp_path: Path) -> None:
    await commit_imported(store, KEYS, ASKED, LORA, tmp_path / "file")
    store.fail("delete", failed("delete"))

    with pytest.raises(StorageFailed):
        await delete_imported(store, KEYS, LORA_ID)

    assert await read_imported(store, KEYS, LORA_ID) == LORA
