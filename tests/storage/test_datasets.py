from __future__ import annotations

import hashlib
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from storage.datasets import (
    BATCH_FILES,
    SMALL_FILE_BYTES,
    DatasetManifestInvalid,
    DatasetNotFound,
    DatasetNotStored,
    dataset_folders,
    delete_other_uploads,
    latest_manifest,
    new_upload_id,
    parse_manifest,
    write_dataset,
)
from storage.errors import InvalidKey, StorageTimeout, StorageUnavailable
from storage.keys import Keys
from storage.testing import InMemoryStore

NOW = datetime(2026, 11, 21, 12, tzinfo=UTC)
KEYS = Keys("raylora", "matt")


@pytest.fixture
def store() -> InMemoryStore:
    return InMemoryStore()


def test_a_later_upload_has_a_greater_id() -> None:
    ids = [new_upload_id(NOW + timedelta(microseconds=i)) for i in range(50)]
    assert ids == sorted(ids)
    assert len({new_upload_id(NOW) for _ in range(50)}) == 50


async def test_a_written_dataset_is_found_with_all_its_files(store: InMemoryStore, tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("a cat")
    files = [("a.png", b"pixels", None), ("b.txt", tmp_path / "b.txt", None)]
    written = await write_dataset(store, KEYS, "cats", files, now=NOW, training_name="t", trigger_word="ohwx")
    found = await latest_manifest(store, KEYS, "cats")
    assert found == written
    assert [(f.filename, f.content_type, f.size_bytes) for f in found.files] == [
        ("a.png", "image/png", 6),
        ("b.txt", "text/plain", 5),
    ]
    for file in found.files:
        data = await store.get(file.key)
        assert hashlib.sha256(data).hexdigest() == file.sha256
    assert (found.training_name, found.trigger_word, found.size_bytes) == ("t", "ohwx", 11)


async def test_the_newest_upload_wins_and_an_older_one_can_be_asked_for(store: InMemoryStore) -> None:
    first = await write_dataset(store, KEYS, "cats", [("a.png", b"1", None)], now=NOW)
    second = await write_dataset(store, KEYS, "cats", [("a.png", b"2", None)], now=NOW + timedelta(seconds=1))
    assert await latest_manifest(store, KEYS, "cats") == second
    assert await latest_manifest(store, KEYS, "cats", upload_id=first.upload_id) == first


async def test_an_upload_that_broke_off_does_not_exist(store: InMemoryStore) -> None:
    whole = await write_dataset(store, KEYS, "cats", [("a.png", b"1", None)], now=NOW)
    store.fail("put", StorageTimeout("put", 1.0))
    with pytest.raises(DatasetNotStored):
        await write_dataset(store, KEYS, "cats", [("a.png", b"2", None)], now=NOW + timedelta(seconds=1))
    assert await latest_manifest(store, KEYS, "cats") == whole


async def test_every_file_that_was_not_stored_is_named_with_its_reason(store: InMemoryStore, tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(bytes(SMALL_FILE_BYTES + 1))
    files = [(f"{number}.png", b"1", None) for number in range(3)] + [("large.png", tmp_path / "large", None)]
    store.fail("put", StorageTimeout("put", 1.0), StorageUnavailable("put", 41.0))
    store.fail("upload_file", StorageTimeout("upload_file", 1.0))

    with pytest.raises(DatasetNotStored) as failed:
        await write_dataset(store, KEYS, "cats", files, now=NOW)

    assert dict(failed.value.failures) == {
        "0.png": "storage_timeout",
        "1.png": "storage_unavailable",
        "large.png": "storage_timeout",
    }
    assert failed.value.retry_after_s == 41.0
    with pytest.raises(DatasetNotFound):
        await latest_manifest(store, KEYS, "cats")


async def test_more_files_than_a_batch_are_all_stored(store: InMemoryStore) -> None:
    files = [(f"{number:04d}.png", bytes([number % 256]), None) for number in range(3 * BATCH_FILES + 1)]

    manifest = await write_dataset(store, KEYS, "cats", files, now=NOW)

    assert [(file.filename, await store.get(file.key)) for file in manifest.files] == [file[:2] for file in files]


async def test_a_missing_dataset_is_its_own_error(store: InMemoryStore) -> None:
    with pytest.raises(DatasetNotFound):
        await latest_manifest(store, KEYS, "cats")
    with pytest.raises(DatasetNotFound):
        await latest_manifest(store, KEYS, "cats", upload_id="20260101T000000000000Z-00000000")


async def test_another_tenants_dataset_is_not_found(store: InMemoryStore) -> None:
    await write_dataset(store, KEYS, "cats", [("a.png", b"1", None)], now=NOW)
    for tenant in ("mat", "matt2"):
        with pytest.raises(DatasetNotFound):
            await latest_manifest(store, Keys("raylora", tenant), "cats")
        assert await dataset_folders(store, Keys("raylora", tenant)) == []


async def test_a_dataset_whose_name_begins_with_anothers_is_another(store: InMemoryStore) -> None:
    await write_dataset(store, KEYS, "cats2", [("a.png", b"1", None)], now=NOW)
    with pytest.raises(DatasetNotFound):
        await latest_manifest(store, KEYS, "cats")


async def test_an_upload_can_extend_an_earlier_one(store: InMemoryStore) -> None:
    first = await write_dataset(store, KEYS, "cats", [("a.png", b"1", None), ("b.png", b"2", None)], now=NOW)
    later = NOW + timedelta(seconds=1)
    second = await write_dataset(
        store, KEYS, "cats", [("b.png", b"3", None), ("c.png", b"4", None)], now=later, base=first
    )
    assert [f.filename for f in second.files] == ["a.png", "b.png", "c.png"]
    assert await store.get(second.files[1].key) == b"3"
    assert await delete_other_uploads(store, KEYS, second) == 2
    for file in second.files:
        assert await store.exists(file.key)
    assert await latest_manifest(store, KEYS, "cats") == second


async def test_cleaning_up_leaves_newer_uploads_and_other_datasets_alone(store: InMemoryStore) -> None:
    old = await write_dataset(store, KEYS, "cats", [("a.png", b"0", None)], now=NOW - timedelta(seconds=1))
    middle = await write_dataset(store, KEYS, "cats", [("a.png", b"1", None)], now=NOW)
    newest = await write_dataset(store, KEYS, "cats", [("a.png", b"2", None)], now=NOW + timedelta(seconds=1))
    other = await write_dataset(store, KEYS, "dogs", [("a.png", b"3", None)], now=NOW - timedelta(seconds=9))
    assert await delete_other_uploads(store, KEYS, middle) == 2
    assert not await store.exists(old.files[0].key)
    assert await latest_manifest(store, KEYS, "cats") == newest
    assert await latest_manifest(store, KEYS, "dogs") == other


async def test_finished_datasets_are_listed_by_name(store: InMemoryStore) -> None:
    for name in ("dogs", "cats"):
        await write_dataset(store, KEYS, name, [("a.png", b"1", None)], now=NOW)
    await store.put(KEYS.dataset_file("half", "20260101T000000000000Z-00000000", "a.png"), b"1")
    assert await dataset_folders(store, KEYS) == ["cats", "dogs"]


async def test_a_broken_manifest_is_an_error_of_its_own(store: InMemoryStore) -> None:
    manifest = await write_dataset(store, KEYS, "cats", [("a.png", b"1", None)], now=NOW)
    await store.put(KEYS.dataset_manifest("cats", manifest.upload_id), b"{}")
    with pytest.raises(DatasetManifestInvalid):
        await latest_manifest(store, KEYS, "cats")
    with pytest.raises(DatasetManifestInvalid):
        parse_manifest("cats", b"\xff")


@pytest.mark.parametrize("name", ["../a.png", "manifest.json", "Manifest.JSON", ".a.png", ""])
async def test_a_file_cannot_leave_its_upload_or_pose_as_a_manifest(store: InMemoryStore, name: str) -> None:
    with pytest.raises(InvalidKey):
        await write_dataset(store, KEYS, "cats", [(name, b"1", None)], now=NOW)
