"""What the system before this one stored is read where it lies, by the tenant that it belongs to and nobody else."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime

import pytest

from storage.datasets import DatasetNotFound, latest_manifest, write_dataset
from storage.keys import Keys
from storage.older_layout import readable_folders, readable_manifest
from storage.testing import InMemoryStore

NOW = datetime(2026, 1, 2, tzinfo=UTC)
OWN, OTHER = Keys("raylora", "matt", reads_older=True), Keys("raylora", "matt2")


@pytest.fixture
async def store() -> InMemoryStore:
    store = InMemoryStore()
    for key in (
        "raylora/dataset/zib/a.png",
        "raylora/dataset/zib/a.txt",
        "raylora/dataset/zib/.hidden",
        "raylora/dataset/zib/deeper/b.png",
        "raylora/dataset/zib2/other.png",
        "raylora/datasets/zob/c.jpg",
        "raylora/results/person/lora/person.safetensors",
    ):
        await store.put(key, key.encode())
    return store


async def test_a_data_set_of_the_older_layout_becomes_one_with_its_files_where_they_are(store: InMemoryStore) -> None:
    manifest = await readable_manifest(store, OWN, "zib", now=NOW)

    assert [(file.filename, file.key) for file in manifest.files] == [
        ("a.png", "raylora/dataset/zib/a.png"),
        ("a.txt", "raylora/dataset/zib/a.txt"),
    ]
    assert manifest.files[0].sha256 == hashlib.sha256(b"raylora/dataset/zib/a.png").hexdigest()
    assert manifest.files[0].content_type == "image/png"
    assert await latest_manifest(store, OWN, "zib", upload_id=manifest.upload_id) == manifest
    assert await readable_manifest(store, OWN, "zib", now=NOW) == manifest
    assert (await readable_manifest(store, OWN, "zob", now=NOW)).files[0].key == "raylora/datasets/zob/c.jpg"


async def test_a_data_set_of_todays_layout_comes_first(store: InMemoryStore) -> None:
    written = await write_dataset(store, OWN, "zib", [("new.png", b"1", None)], now=NOW)
    assert await readable_manifest(store, OWN, "zib", now=NOW) == written


async def test_data_sets_of_both_layouts_are_listed(store: InMemoryStore) -> None:
    await write_dataset(store, OWN, "zab", [("new.png", b"1", None)], now=NOW)
    assert await readable_folders(store, OWN) == ["zab", "zib", "zib2", "zob"]


async def test_another_tenant_sees_nothing_of_it(store: InMemoryStore) -> None:
    assert await readable_folders(store, OTHER) == []
    with pytest.raises(DatasetNotFound):
        await readable_manifest(store, OTHER, "zib", now=NOW)
    with pytest.raises(DatasetNotFound):
        await readable_manifest(store, OWN, "zi", now=NOW)


@pytest.mark.parametrize(
    ("key", "readable"),
    [
        ("raylora/results/person/lora/person.safetensors", True),
        ("raylora/dataset/zib/a.png", True),
        ("raylora/matt/processes/x/lora/a", True),
        ("raylora/matt2/processes/x/lora/a", False),
        ("raylora/processes/x.json", False),
        ("raylora/results2/x", False),
        ("raylora/results/../matt2/x", False),
        ("other/results/x", False),
    ],
)
def test_only_the_older_folders_are_opened_and_only_to_their_tenant(key: str, readable: bool) -> None:
    assert OWN.may_read(key) is readable
    assert not OWN.owns(key) or key.startswith("raylora/matt/")
    assert OTHER.may_read(key) == key.startswith("raylora/matt2/")
