from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.blocking import BlockingStorage
from storage.errors import ObjectNotFound
from storage.objects import ObjectStore, PutItem
from storage.testing import InMemoryStore


@pytest.fixture
def blocking() -> Iterator[BlockingStorage]:
    storage = BlockingStorage(InMemoryStore())
    yield storage
    storage.close()


def test_every_operation_of_a_store_is_there(blocking: BlockingStorage, tmp_path: Path) -> None:
    blocking.ensure_bucket()
    blocking.put("a/1", b"one", content_type="text/plain")
    blocking.put_many([PutItem("a/2", b"two")])
    blocking.copy("a/1", "a/3")
    blocking.download_file("a/2", tmp_path / "two")
    blocking.upload_file(tmp_path / "two", "a/4")

    assert blocking.get("a/4") == b"two"
    assert blocking.head("a/3").size_bytes == 3
    assert [info.key for info in blocking.list("a/")] == ["a/1", "a/2", "a/3", "a/4"]
    assert blocking.presign_get("a/1")
    assert blocking.presign_put("a/9")
    assert blocking.health().ok
    blocking.delete("a/1")
    assert blocking.delete_many(["a/2"]) == 1
    assert not blocking.exists("a/1")
    operations = {name for name in vars(ObjectStore) if not name.startswith("_")}
    assert operations <= set(dir(blocking))


def test_errors_come_through(blocking: BlockingStorage) -> None:
    with pytest.raises(ObjectNotFound):
        blocking.get("missing")


def test_a_copy_made_by_pickle_has_a_thread_of_its_own() -> None:
    original = BlockingStorage(_Reopened())
    copy = pickle.loads(pickle.dumps(original))  # noqa: S301

    copy.put("a", b"1")

    assert copy.exists("a")
    original.close()
    copy.close()


class _Reopened(InMemoryStore):
    def __reduce__(self) -> tuple[type[_Reopened], tuple[()]]:
        return _Reopened, ()
