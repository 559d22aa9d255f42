"""What any object store does, held against the one in memory and against S3 on real servers.

`rclone` is the embedded server; `moto` and `aws` are moto's, spoken to with the settings of either backend.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from storage.embedded import EmbeddedS3
from storage.errors import IntegrityError, InvalidKey, ObjectNotFound
from storage.objects import ObjectStore, PutItem
from storage.s3 import S3Store
from storage.testing import InMemoryStore
from tests.integration.s3_stores import moto_settings


@pytest.fixture(params=["memory", "rclone", "moto", "aws"])
async def store(request: pytest.FixtureRequest) -> AsyncIterator[ObjectStore]:
    if request.param == "memory":
        yield InMemoryStore()
        return
    if request.param == "rclone":
        server: EmbeddedS3 = request.getfixturevalue("embedded_s3")
        settings = server.settings()
    else:
        settings = moto_settings(request.getfixturevalue("moto_url"), request.param)
    async with S3Store(settings) as s3:
        await s3.ensure_bucket()
        yield s3


@pytest.fixture
def root() -> str:
    """A prefix of this test's own."""
    return f"raylora/{secrets.token_hex(6)}"


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("data", [b"", b"x", bytes(range(256)) * 20_000])
async def test_what_was_put_comes_back(store: ObjectStore, root: str, data: bytes) -> None:
    info = await store.put(f"{root}/a.bin", data, content_type="application/x-test")

    assert (info.key, info.size_bytes, info.sha256) == (f"{root}/a.bin", len(data), sha256(data))
    assert info.content_type == "application/x-test"
    assert await store.get(f"{root}/a.bin", expected_sha256=sha256(data)) == data
    assert (await store.head(f"{root}/a.bin")).sha256 == sha256(data)


async def test_times_are_aware_and_recent(store: ObjectStore, root: str) -> None:
    info = await store.put(f"{root}/a", b"1")

    assert info.modified_at is not None
    assert abs(datetime.now(UTC) - info.modified_at) < timedelta(minutes=5)


async def test_a_missing_object_is_not_found(store: ObjectStore, root: str, tmp_path: Path) -> None:
    missing = f"{root}/missing"

    for operation in (
        store.get(missing),
        store.head(missing),
        store.copy(missing, f"{root}/b"),
        store.download_file(missing, tmp_path / "x"),
    ):
        with pytest.raises(ObjectNotFound):
            await operation
    assert not await store.exists(missing)
    assert names_in(tmp_path) == []


async def test_a_folder_is_not_an_object(store: ObjectStore, root: str) -> None:
    await store.put(f"{root}/folder/a", b"1")

    assert not await store.exists(f"{root}/folder")


async def test_bytes_other_than_expected_are_refused(store: ObjectStore, root: str, tmp_path: Path) -> None:
    await store.put(f"{root}/a", b"1")

    with pytest.raises(IntegrityError):
        await store.get(f"{root}/a", expected_sha256=sha256(b"2"))
    with pytest.raises(IntegrityError):
        await store.download_file(f"{root}/a", tmp_path / "a", expected_sha256=sha256(b"2"))
    assert names_in(tmp_path) == []


async def test_overwriting_replaces(store: ObjectStore, root: str) -> None:
    await store.put(f"{root}/a", b"the first")
    await store.put(f"{root}/a", b"second")

    assert await store.get(f"{root}/a") == b"second"


async def test_deleting_is_idempotent(store: ObjectStore, root: str) -> None:
    await store.put(f"{root}/a", b"1")

    await store.delete(f"{root}/a")
    await store.delete(f"{root}/a")

    assert not await store.exists(f"{root}/a")


async def test_many_are_put_in_order_and_deleted(store: ObjectStore, root: str) -> None:
    items = [PutItem(f"{root}/many/{number:03d}", str(number).encode()) for number in range(50)]

    outcomes = await store.put_many(items)

    assert [outcome.key for outcome in outcomes] == [item.key for item in items]
    assert all(outcome.error is None and outcome.info is not None for outcome in outcomes)
    assert await store.delete_many([item.key for item in items]) == 50
    assert await store.delete_many([]) == 0
    assert await store.list(f"{root}/many/") == []


async def test_one_bad_item_does_not_spoil_the_others(store: ObjectStore, root: str) -> None:
    outcomes = await store.put_many([PutItem(f"{root}/a", b"1"), PutItem(f"{root}/../b", b"2")])

    assert outcomes[0].error is None
    assert isinstance(outcomes[1].error, InvalidKey)


async def test_a_listing_is_in_key_order_and_can_be_cut_and_continued(store: ObjectStore, root: str) -> None:
    keys = [f"{root}/l/{name}" for name in ["b", "a/z", "B", "a", "ä", "a.b", "a-b"] if name != "a"]
    await store.put_many([PutItem(key, b"1") for key in keys])
    expected = sorted(keys, key=str.encode)

    assert [info.key for info in await store.list(f"{root}/l/")] == expected
    assert [info.key for info in await store.list(f"{root}/l/", limit=2)] == expected[:2]
    assert [info.key for info in await store.list(f"{root}/l/", start_after=expected[2])] == expected[3:]
    assert await store.list(f"{root}/l/", limit=0) == []


async def test_a_listing_does_not_match_the_neighbour(store: ObjectStore, root: str) -> None:
    await store.put(f"{root}/matt/a", b"1")
    await store.put(f"{root}/matt2/a", b"1")

    assert [info.key for info in await store.list(f"{root}/matt/")] == [f"{root}/matt/a"]


async def test_a_copy_has_the_bytes_and_the_type(store: ObjectStore, root: str) -> None:
    await store.put(f"{root}/a", b"1234", content_type="text/plain")

    info = await store.copy(f"{root}/a", f"{root}/b")

    assert (info.key, info.size_bytes, info.content_type) == (f"{root}/b", 4, "text/plain")
    assert await store.get(f"{root}/b") == b"1234"


@pytest.mark.parametrize("name", ["photo 1 (copy).jpg", "фото.png", "写真.jpg", "a+b,c=[d]!'e&~@f.webp"])
async def test_names_of_any_script_survive(store: ObjectStore, root: str, name: str) -> None:
    await store.put(f"{root}/n/{name}", b"1")
    await store.copy(f"{root}/n/{name}", f"{root}/copy/{name}")

    assert [info.key for info in await store.list(f"{root}/n/")] == [f"{root}/n/{name}"]
    assert await store.get(f"{root}/copy/{name}") == b"1"


@pytest.mark.parametrize("size_bytes", [0, 1000, 16 * 2**20 + 1])
async def test_files_survive_the_way_there_and_back(
    store: ObjectStore, root: str, tmp_path: Path, size_bytes: int
) -> None:
    data = secrets.token_bytes(size_bytes)
    (tmp_path / "source").write_bytes(data)

    up = await store.upload_file(tmp_path / "source", f"{root}/file", content_type="application/x-test")
    down = await store.download_file(f"{root}/file", tmp_path / "target", expected_sha256=sha256(data))

    assert up.size_bytes == down.size_bytes == size_bytes
    assert up.sha256 == down.sha256 == sha256(data)
    assert up.content_type == "application/x-test"
    assert (tmp_path / "target").read_bytes() == data
    assert names_in(tmp_path) == ["source", "target"]


async def test_a_missing_file_is_the_callers_error(store: ObjectStore, root: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        await store.upload_file(tmp_path / "missing", f"{root}/file")


async def test_a_healthy_store_says_so(store: ObjectStore) -> None:
    await store.ensure_bucket()
    health = await store.health()

    assert health.ok
    assert health.breaker == "closed"
    assert health.latency_ms is not None
