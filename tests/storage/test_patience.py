from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path

import pytest

from storage.actor import StorageClient
from storage.errors import (
    ObjectNotFound,
    StorageError,
    StorageFailed,
    StorageMisconfigured,
    StorageRefused,
    StorageTimeout,
    StorageUnavailable,
)
from storage.objects import ObjectStore, PutItem, PutOutcome
from storage.patience import PatientStore
from storage.settings import S3Settings
from storage.testing import InMemoryStore

OUTAGES = [
    StorageUnavailable("put", 60.0),
    StorageTimeout("put", 120.0),
    StorageFailed("put", 4, "connection"),
]


class Outage:
    """The store is away until `lasts` naps were taken. `told` is what a waiting call said of itself."""

    def __init__(self, store: InMemoryStore, error: StorageError, *, lasts: int = 30) -> None:
        self.store, self.error, self.lasts = store, error, lasts
        self.naps: list[float] = []
        self.told: list[bool] = []
        self.stop_at: int | None = None
        store.break_down(error)

    async def sleep(self, seconds: float) -> None:
        self.naps.append(seconds)
        if len(self.naps) == self.lasts:
            self.store.recover()

    def should_stop(self) -> bool:
        return self.stop_at is not None and len(self.naps) >= self.stop_at

    def patient(self) -> PatientStore:
        return PatientStore(self.store, should_stop=self.should_stop, tell=self.told.append, sleep=self.sleep)


@pytest.fixture
def store() -> InMemoryStore:
    return InMemoryStore()


def test_it_is_an_object_store(store: InMemoryStore) -> None:
    assert isinstance(PatientStore(store), ObjectStore)


@pytest.mark.parametrize("error", OUTAGES, ids=lambda error: error.code)
async def test_a_call_waits_until_the_storage_is_back(store: InMemoryStore, error: StorageError) -> None:
    outage = Outage(store, error)

    await outage.patient().put("a", b"bytes")

    assert await store.get("a") == b"bytes"
    assert len(outage.naps) >= 30
    assert outage.told == [True, False]


async def test_every_operation_waits(store: InMemoryStore, tmp_path: Path) -> None:
    await store.put("a", b"bytes")
    path = tmp_path / "file"
    path.write_bytes(b"bytes")
    for operation, arguments in {
        "put": ("b", b"bytes"),
        "get": ("a",),
        "head": ("a",),
        "exists": ("a",),
        "copy": ("a", "c"),
        "upload_file": (path, "d"),
        "download_file": ("a", path),
        "presign_get": ("a",),
        "presign_put": ("a",),
        "ensure_bucket": (),
        "delete": ("b",),
        "delete_many": (["c"],),
        "list": ("a/",),
    }.items():
        outage = Outage(store, OUTAGES[0])
        await getattr(outage.patient(), operation)(*arguments)
        assert outage.told == [True, False], operation


async def test_of_many_objects_only_those_that_failed_are_sent_again(store: InMemoryStore) -> None:
    items = [PutItem(name, name.encode()) for name in "abc"]
    outage = Outage(store, OUTAGES[1])
    store.recover()
    store.fail("put", StorageTimeout("put", 120.0))

    outcomes = await outage.patient().put_many(items)

    assert [outcome.key for outcome in outcomes] == ["a", "b", "c"]
    assert all(outcome.info is not None and outcome.error is None for outcome in outcomes)
    assert store.calls["put"] == 4


async def test_of_many_objects_one_that_is_refused_is_told_and_the_others_are_stored(store: InMemoryStore) -> None:
    outage = Outage(store, OUTAGES[0])
    store.recover()
    store.fail("put", StorageRefused("put", 1, "bad_request"))

    outcomes = await outage.patient().put_many([PutItem(name, b"") for name in "ab"])

    assert [outcome.error is None for outcome in outcomes] == [False, True]
    assert outage.naps == []


@pytest.mark.parametrize("error", [StorageRefused("get", 1, "bad_request"), ObjectNotFound("a")])
async def test_what_waiting_does_not_change_is_raised_at_once(store: InMemoryStore, error: StorageError) -> None:
    outage = Outage(store, error)

    with pytest.raises(type(error)):
        await outage.patient().get("a")

    assert outage.naps == []
    assert outage.told == []


async def test_a_call_that_keeps_failing_while_the_storage_answers_is_raised(store: InMemoryStore) -> None:
    outage = Outage(store, OUTAGES[2])
    store.recover()
    store.fail("put", *[StorageFailed("put", 4, "server_error")] * 2)

    with pytest.raises(StorageFailed):
        await outage.patient().put("a", b"")

    assert store.calls["put"] == 2


async def test_one_that_failed_just_before_the_storage_was_back_is_made_again(store: InMemoryStore) -> None:
    outage = Outage(store, OUTAGES[2])
    store.recover()
    store.fail("put", StorageFailed("put", 4, "server_error"))

    await outage.patient().put("a", b"")

    assert await store.exists("a")


async def test_asked_to_stop_it_gives_up_and_raises_what_went_wrong(store: InMemoryStore) -> None:
    outage = Outage(store, OUTAGES[0])
    outage.stop_at = 3

    with pytest.raises(StorageUnavailable):
        await outage.patient().put("a", b"")

    assert len(outage.naps) == 3
    assert outage.told == [True, False]


def test_one_without_callbacks_survives_pickle() -> None:
    assert isinstance(pickle.loads(pickle.dumps(PatientStore(StorageClient(S3Settings())))), PatientStore)  # noqa: S301


class Unreachable(InMemoryStore):
    """Its whole `put_many` fails, as that of a store whose process is gone."""

    async def put_many(self, items: Sequence[PutItem]) -> list[PutOutcome]:
        raise StorageMisconfigured("created with other settings")


async def test_no_object_is_taken_for_stored_where_the_whole_call_failed() -> None:
    outcomes = await PatientStore(Unreachable()).put_many([PutItem(name, b"") for name in "ab"])

    assert [outcome.key for outcome in outcomes] == ["a", "b"]
    assert all(isinstance(outcome.error, StorageMisconfigured) for outcome in outcomes)
