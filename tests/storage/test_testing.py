from __future__ import annotations

import asyncio

import pytest

from storage.breaker import BreakerMode
from storage.errors import StorageFailed, StorageUnavailable
from storage.objects import ObjectStore, StoreMaintenance
from storage.testing import InMemoryStore


def test_it_is_an_object_store() -> None:
    assert isinstance(InMemoryStore(), ObjectStore)
    assert isinstance(InMemoryStore(), StoreMaintenance)


async def test_scripted_errors_come_once_each_and_in_order() -> None:
    store = InMemoryStore()
    store.fail("put", StorageFailed("put", 4, "server_error"), StorageUnavailable("put", 60))

    with pytest.raises(StorageFailed):
        await store.put("a", b"1")
    with pytest.raises(StorageUnavailable):
        await store.put("a", b"1")
    await store.put("a", b"1")

    assert store.calls["put"] == 3
    assert store.keys() == ["a"]


async def test_a_broken_store_fails_everything_until_it_recovers() -> None:
    store = InMemoryStore()
    store.break_down(StorageUnavailable("storage", 60))

    with pytest.raises(StorageUnavailable):
        await store.exists("a")
    assert not (await store.health()).ok

    store.recover()
    assert not await store.exists("a")
    assert (await store.health()).ok


async def test_a_held_operation_waits() -> None:
    store = InMemoryStore()
    held = store.hold("put")
    task = asyncio.create_task(store.put("a", b"1"))
    await asyncio.sleep(0)

    assert store.keys() == []
    held.set()
    await task
    assert store.keys() == ["a"]


async def test_its_health_shows_what_an_operator_set() -> None:
    store = InMemoryStore()
    before = await store.health()
    await store.set_breaker(BreakerMode.FORCED_OPEN)
    forced = await store.health()

    assert (before.breaker, before.breaker_mode) == ("closed", "automatic")
    assert (forced.breaker, forced.breaker_mode) == ("open", "forced_open")
