"""The S3 store against a real server, through a proxy that spoils some of the requests."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from storage.breaker import BreakerMode
from storage.counters import CLEANUP_FAILURES, HELD, RETRIES
from storage.embedded import EmbeddedS3
from storage.errors import (
    IntegrityError,
    StorageFailed,
    StorageTimeout,
    StorageUnavailable,
)
from storage.fault_proxy import Fault, FaultProxy
from storage.s3 import S3Store
from tests.integration.s3_stores import PART_BYTES, no_wait, read


@pytest.mark.parametrize("fault", [Fault.SLOW_DOWN, Fault.RESET, Fault.TRUNCATE])
async def test_a_read_survives_a_passing_fault(store: S3Store, proxy: FaultProxy, key: str, fault: Fault) -> None:
    await store.put(key, b"12345678")
    proxy.script("GET", fault, fault)

    assert await store.get(key) == b"12345678"
    assert proxy.requests["GET"] == 3


async def test_garbage_of_the_right_length_is_noticed_and_read_again(
    store: S3Store, proxy: FaultProxy, key: str
) -> None:
    await store.put(key, b"12345678")
    proxy.script("GET", Fault.GARBLE)

    assert await store.get(key, expected_sha256=hashlib.sha256(b"12345678").hexdigest()) == b"12345678"


async def test_garbage_that_stays_is_an_integrity_error_and_opens_nothing(
    store: S3Store, proxy: FaultProxy, key: str
) -> None:
    await store.put(key, b"12345678")
    for _ in range(2):
        with pytest.raises(IntegrityError):
            await store.get(key, expected_sha256=hashlib.sha256(b"other").hexdigest())

    assert (await store.health()).breaker == "closed"


@pytest.mark.parametrize("fault", [Fault.SLOW_DOWN, Fault.RESET])
async def test_a_write_that_had_no_effect_is_written_again(
    store: S3Store, proxy: FaultProxy, key: str, fault: Fault
) -> None:
    proxy.script("PUT", fault)

    await store.put(key, b"12345678")

    assert proxy.forwarded["PUT"] == 1
    assert await store.get(key) == b"12345678"


async def test_a_write_whose_answer_was_lost_is_looked_up_and_not_written_twice(
    store: S3Store, proxy: FaultProxy, key: str
) -> None:
    proxy.script("PUT", Fault.LOSE_ANSWER)

    info = await store.put(key, b"12345678")

    assert info.sha256 == hashlib.sha256(b"12345678").hexdigest()
    assert proxy.forwarded["PUT"] == 1


async def test_a_silent_server_times_out_even_for_a_large_body(
    embedded_s3: EmbeddedS3, proxy: FaultProxy, key: str
) -> None:
    settings = embedded_s3.settings().model_copy(
        update={"endpoint_url": proxy.url, "attempt_timeout_s": 0.2, "attempts_max": 2}
    )
    proxy.always(Fault.BLACK_HOLE)
    async with S3Store(settings, sleep=no_wait) as store:
        # Making a client takes longer than an attempt may here.
        await store._clients.internal()
        with pytest.raises(StorageTimeout):
            await store.put(key, bytes(100_000))
    assert proxy.requests["PUT"] == 1


async def test_bytes_changed_on_the_server_are_noticed_after_the_write(
    store: S3Store, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bodies = store._calls._bodies
    put = bodies.put

    async def put_other_bytes(name: str, _: bytes, *, sha256: str, content_type: str | None) -> str:
        return await put(name, b"87654321", sha256=sha256, content_type=content_type)

    monkeypatch.setattr(bodies, "put", put_other_bytes)

    with pytest.raises(IntegrityError):
        await store.put(key, b"12345678")

    assert not await store.exists(key)


@pytest.mark.parametrize("is_answer_lost", [False, True])
async def test_parts_changed_on_the_server_are_noticed_and_no_object_is_left(
    store: S3Store,
    proxy: FaultProxy,
    key: str,
    large_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    is_answer_lost: bool,
) -> None:
    send = store._calls.send

    async def send_other_bytes(operation: str, at: str | None, method: str, parameters: Mapping[str, Any]) -> Any:
        if method == "upload_part" and parameters["PartNumber"] == 2:
            parameters = {**parameters, "Body": bytes(len(parameters["Body"]))}
        return await send(operation, at, method, parameters)

    monkeypatch.setattr(store._calls, "send", send_other_bytes)
    if is_answer_lost:
        proxy.script("POST", Fault.NONE, Fault.LOSE_ANSWER)

    with pytest.raises(IntegrityError):
        await store.upload_file(large_file, key)
    await store._files.aclose()

    assert not await store.exists(key)
    assert CLEANUP_FAILURES not in await store.counts()


async def test_a_lost_answer_to_a_copy_does_not_fail_it(store: S3Store, proxy: FaultProxy, key: str) -> None:
    await store.put(key, b"12345678")
    proxy.script("PUT", Fault.LOSE_ANSWER)

    await store.copy(key, key + ".copy")

    assert proxy.forwarded["PUT"] == 2
    assert await store.get(key + ".copy") == b"12345678"


async def test_a_multipart_upload_survives_faults_in_each_of_its_steps(
    store: S3Store, proxy: FaultProxy, key: str, large_file: Path, content: bytes
) -> None:
    proxy.script("PUT", Fault.LOSE_ANSWER, Fault.SLOW_DOWN)
    proxy.script("POST", Fault.SLOW_DOWN, Fault.NONE, Fault.LOSE_ANSWER)

    info = await store.upload_file(large_file, key)

    assert info.sha256 == hashlib.sha256(content).hexdigest()
    assert await store.get(key) == content


async def test_a_download_repeats_only_the_parts_that_failed(
    store: S3Store, proxy: FaultProxy, key: str, large_file: Path, content: bytes, tmp_path: Path
) -> None:
    await store.upload_file(large_file, key)
    proxy.script("GET", Fault.TRUNCATE, Fault.RESET)

    info = await store.download_file(key, tmp_path / "back")

    assert read(tmp_path / "back") == content
    assert info.sha256 == hashlib.sha256(content).hexdigest()
    assert proxy.requests["GET"] == 3 + 2


async def test_an_upload_that_fails_is_aborted_and_leaves_no_object(
    store: S3Store, proxy: FaultProxy, key: str, large_file: Path
) -> None:
    proxy.script("POST", Fault.NONE, *[Fault.RESET] * 4)

    with pytest.raises(StorageFailed):
        await store.upload_file(large_file, key)
    await store._files.aclose()

    assert proxy.forwarded["DELETE"] == 1
    assert not await store.exists(key)


async def test_an_upload_that_the_breaker_cuts_tells_that_it_was_tried(
    store: S3Store, key: str, large_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = store._files._begin_upload

    async def begin_then_open(*arguments: object) -> str:
        upload_id = await begin(*arguments)
        await store.set_breaker(BreakerMode.FORCED_OPEN)
        return upload_id

    monkeypatch.setattr(store._files, "_begin_upload", begin_then_open)
    with pytest.raises(StorageUnavailable) as cut:
        await store.upload_file(large_file, key)
    with pytest.raises(StorageUnavailable) as refused:
        await store.upload_file(large_file, key)

    assert (cut.value.attempts, refused.value.attempts) == (1, 0)


async def test_the_parts_of_a_file_are_held_until_they_are_sent_or_their_upload_is_cancelled(
    store: S3Store, proxy: FaultProxy, key: str, large_file: Path
) -> None:
    proxy.script("PUT", *[Fault.BLACK_HOLE] * 3)
    upload = asyncio.create_task(store.upload_file(large_file, key))
    async with asyncio.timeout(20):
        while True:
            if proxy.requests["PUT"] == 3:
                break
            await asyncio.sleep(0.01)
    during = (await store.counts())[HELD]

    upload.cancel()
    with pytest.raises(asyncio.CancelledError):
        await upload
    await store._files.aclose()

    assert during == {"attempts": 3.0, "part_bytes": 2 * PART_BYTES + 1000, "read_bytes": 0.0}
    assert set((await store.counts())[HELD].values()) == {0.0}


async def test_a_file_that_changes_while_it_is_sent_is_noticed(
    store: S3Store, key: str, large_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = store._files._begin_upload

    async def change_then_begin(*arguments: object) -> str:
        with large_file.open("r+b") as file:
            file.seek(PART_BYTES)
            file.write(bytes(100))
        return await begin(*arguments)

    monkeypatch.setattr(store._files, "_begin_upload", change_then_begin)

    with pytest.raises(IntegrityError):
        await store.upload_file(large_file, key)
    assert not await store.exists(key)


@pytest.mark.parametrize("gone", [True, False])
async def test_a_file_that_goes_or_shrinks_while_it_is_sent_is_no_fault_of_the_servers(
    store: S3Store, proxy: FaultProxy, key: str, large_file: Path, monkeypatch: pytest.MonkeyPatch, gone: bool
) -> None:
    begin = store._files._begin_upload

    async def change_then_begin(*arguments: object) -> str:
        if gone:
            os.unlink(large_file)
        else:
            os.truncate(large_file, PART_BYTES + 100)
        return await begin(*arguments)

    monkeypatch.setattr(store._files, "_begin_upload", change_then_begin)
    with pytest.raises(FileNotFoundError if gone else IntegrityError):
        await store.upload_file(large_file, key)
    health = await store.health()
    assert (health.ok, health.breaker) == (True, "closed")
    assert not await store.exists(key)
    assert sum((await store.counts()).get(RETRIES, {}).values()) == 0


async def test_a_dead_backend_opens_the_breaker_after_five_calls(store: S3Store, proxy: FaultProxy, key: str) -> None:
    proxy.always(Fault.SLOW_DOWN)
    for _ in range(20):
        with pytest.raises((StorageFailed, StorageUnavailable)):
            await store.get(key)

    assert sum(proxy.requests.values()) == 5
    health = await store.health()
    assert (health.ok, health.breaker) == (False, "open")
    assert health.retry_after_s is not None
    assert 0 < health.retry_after_s <= 60


async def test_after_an_outage_one_probe_goes_out_and_then_everybody(
    embedded_s3: EmbeddedS3, proxy: FaultProxy, key: str
) -> None:
    now = 0.0
    settings = embedded_s3.settings().model_copy(update={"endpoint_url": proxy.url})
    async with S3Store(settings, clock=lambda: now, sleep=no_wait) as store:
        await store.put(key, b"1")
        proxy.always(Fault.SLOW_DOWN)
        for _ in range(2):
            with pytest.raises((StorageFailed, StorageUnavailable)):
                await store.get(key)
        now += 60
        proxy.always(None)
        proxy.requests.clear()

        first = await asyncio.gather(*(store.get(key) for _ in range(20)), return_exceptions=True)
        second = await asyncio.gather(*(store.get(key) for _ in range(20)))

    assert first.count(b"1") == 1
    assert second == [b"1"] * 20
    assert proxy.requests["GET"] == 21
