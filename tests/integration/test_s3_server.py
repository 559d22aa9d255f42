"""What the S3 store and a real server make of each other."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from pathlib import Path

import aiohttp
import pytest
from pydantic import SecretStr

from storage.counters import CLEANUP_FAILURES
from storage.embedded import EmbeddedS3
from storage.errors import (
    IntegrityError,
    StorageAccessDenied,
)
from storage.fault_proxy import Fault, FaultProxy
from storage.s3 import S3Store
from tests.integration.s3_stores import (
    PART_BYTES,
    check_presigned_urls,
    check_that_a_missing_bucket_can_be_made,
    no_wait,
    read,
)


async def test_a_presigned_url_gets_and_puts_without_credentials(store: S3Store, key: str) -> None:
    async with aiohttp.ClientSession() as client:
        get_url = await check_presigned_urls(client, store, key)
        async with client.get(get_url.replace("a.bin", "b.bin")) as answer:
            assert answer.status == 403


async def test_a_wrong_secret_is_denied_and_opens_nothing(embedded_s3: EmbeddedS3, key: str) -> None:
    settings = embedded_s3.settings().model_copy(update={"secret_access_key": SecretStr("wrong")})
    async with S3Store(settings) as store:
        for _ in range(6):
            with pytest.raises(StorageAccessDenied):
                await store.put(key, b"1")
        health = await store.health()
    assert (health.ok, health.breaker, health.detail) == (False, "closed", "storage_access_denied")


@pytest.mark.parametrize("region", ["us-east-1", "eu-central-1"])
async def test_a_missing_bucket_is_a_misconfiguration_that_ensure_bucket_mends(
    embedded_s3: EmbeddedS3, region: str
) -> None:
    await check_that_a_missing_bucket_can_be_made(embedded_s3.settings(), region)


async def test_orphan_multipart_uploads_are_found_and_aborted(store: S3Store, key: str) -> None:
    prefix = f"{key.rpartition('/')[0]}/"
    sha256 = hashlib.sha256(b"1").hexdigest()
    upload_id = await store._files._begin_upload(key, sha256, None)
    neighbour = await store._files._begin_upload(f"raylora/{secrets.token_hex(6)}/b", sha256, None)

    pending = await store.list_uploads(prefix)
    assert [(upload.key, upload.upload_id) for upload in pending] == [(key, upload_id)]
    assert upload_id != neighbour
    await store.abort_upload(key, upload_id)
    await store.abort_upload(key, upload_id)

    assert await store.list_uploads(prefix) == []


async def test_what_the_server_can_do_is_tried_out_once_and_nothing_is_left_of_it(
    store: S3Store, proxy: FaultProxy
) -> None:
    found = await store.capabilities()
    asked = sum(proxy.requests.values())

    assert await store.capabilities() == found
    assert (found.conditional_writes, found.ranged_reads, found.answers_with_etag) == (False, True, True)
    assert (found.tags, found.lifecycle, found.presigned_post) == (False, False, False)
    assert sum(proxy.requests.values()) == asked
    assert await store.list("raylora/probes/") == []


async def test_two_who_ask_at_once_what_the_server_can_do_try_it_out_once(store: S3Store, proxy: FaultProxy) -> None:
    first, second = await asyncio.gather(store.capabilities(), store.capabilities())

    assert first == second
    assert proxy.requests["DELETE"] == 1


@pytest.mark.parametrize("fault", [Fault.NOT_IMPLEMENTED, Fault.FORBIDDEN])
async def test_a_server_that_refuses_a_condition_that_it_does_not_know_has_no_conditional_writes(
    store: S3Store, proxy: FaultProxy, fault: Fault
) -> None:
    proxy.script("PUT", Fault.NONE, fault)
    if fault is Fault.FORBIDDEN:
        with pytest.raises(StorageAccessDenied):
            await store.capabilities()

    assert not (await store.capabilities()).conditional_writes
    assert await store.list("raylora/probes/") == []


async def test_nothing_is_left_of_a_trial_that_failed(store: S3Store, proxy: FaultProxy) -> None:
    proxy.script("GET", Fault.FORBIDDEN)

    with pytest.raises(StorageAccessDenied):
        await store.capabilities()

    assert await store.list("raylora/probes/") == []


async def test_a_trial_that_cannot_be_cleared_away_counts_and_the_next_one_uses_its_object(
    store: S3Store, proxy: FaultProxy
) -> None:
    proxy.script("GET", Fault.FORBIDDEN)
    proxy.script("DELETE", Fault.FORBIDDEN)
    with pytest.raises(StorageAccessDenied):
        await store.capabilities()
    assert (await store.counts())[CLEANUP_FAILURES] == {"probe": 1}
    assert len(await store.list("raylora/probes/")) == 1

    await store.capabilities()

    assert await store.list("raylora/probes/") == []


async def test_a_read_is_checked_against_the_digest_of_the_write(
    store: S3Store, proxy: FaultProxy, key: str, large_file: Path, tmp_path: Path
) -> None:
    await store.put(key, b"12345678")
    proxy.script("GET", Fault.GARBLE)
    assert await store.get(key) == b"12345678"
    assert proxy.requests["GET"] == 2

    sha256 = (await store.upload_file(large_file, key + ".large")).sha256
    proxy.script("GET", Fault.GARBLE)
    with pytest.raises(IntegrityError):
        await store.download_file(key + ".large", tmp_path / "back", expected_sha256=sha256)
    assert not (tmp_path / "back").exists()


async def test_a_listing_of_ten_thousand_keys_is_complete_and_in_order(tmp_path: Path) -> None:
    """They are put there as files, which is what the embedded server's objects are, before it reads the folder."""
    folder = tmp_path / "objects" / "raylora" / "many"
    folder.mkdir(parents=True)
    names = [f"{number:05d}" for number in range(10_050)]
    for name in names:
        (folder / name).touch()
    with EmbeddedS3(tmp_path, 0) as server:
        async with S3Store(server.settings()) as store:
            assert [info.key for info in await store.list("many/")] == [f"many/{name}" for name in names]
            assert len(await store.list("many/", limit=1050)) == 1050
            assert await store.delete_many([f"many/{name}" for name in names]) == len(names)
            assert await store.list("many/") == []


async def test_files_in_flight_share_one_bound_of_bytes(
    embedded_s3: EmbeddedS3, key: str, large_file: Path, content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bounds = {"part_size_bytes": PART_BYTES, "multipart_threshold_bytes": PART_BYTES, "bytes_in_flight_max": PART_BYTES}
    held: list[int] = []
    async with S3Store(embedded_s3.settings().model_copy(update=bounds)) as store:
        send = store._calls.send

        async def noting(operation: str, name: str | None, method: str, parameters: dict[str, object]) -> object:
            held.append(store._files._in_flight.held_bytes)
            return await send(operation, name, method, parameters)

        monkeypatch.setattr(store._calls, "send", noting)
        await asyncio.gather(*(store.upload_file(large_file, f"{key}{number}") for number in range(4)))
        await asyncio.gather(*(store.download_file(f"{key}{number}", tmp_path / str(number)) for number in range(4)))

    assert max(held) == PART_BYTES
    assert [read(tmp_path / str(number)) for number in range(4)] == [content] * 4


async def test_a_large_objects_first_look_does_not_wait_for_its_hash(embedded_s3: EmbeddedS3, key: str) -> None:
    """The embedded server sends no ETag of what it would have to read in whole; one of what was just sent, it does."""
    async with S3Store(embedded_s3.settings()) as store:
        await store.put(key, b"12345678")
        answer = await store._calls.head("head", key)

    assert answer["ETag"].strip('"') == ""


async def test_a_copy_of_other_bytes_is_noticed_where_etags_say_nothing(
    store: S3Store, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await store.put(key, b"12345678")
    send = store._calls.send

    async def copy_other_bytes(operation: str, name: str | None, method: str, parameters: dict[str, object]) -> object:
        if method == "copy_object":
            return await send(operation, name, "put_object", {"Key": parameters["Key"], "Body": b"87654321"})
        return await send(operation, name, method, parameters)

    monkeypatch.setattr(store._calls, "send", copy_other_bytes)

    with pytest.raises(IntegrityError):
        await store.copy(key, key + ".copy")


async def test_the_server_may_take_its_time_to_put_a_large_object_together(
    embedded_s3: EmbeddedS3, proxy: FaultProxy, key: str, large_file: Path, content: bytes
) -> None:
    bounds = {"read_timeout_s": 0.5, "part_size_bytes": PART_BYTES, "multipart_threshold_bytes": PART_BYTES}
    settings = embedded_s3.settings().model_copy(update={"endpoint_url": proxy.url, **bounds})
    proxy.slow_s = 1.0
    proxy.script("POST", Fault.NONE, Fault.SLOW)
    async with S3Store(settings, sleep=no_wait) as store:
        await store.upload_file(large_file, key)
        assert proxy.forwarded["POST"] == 2
        assert await store.get(key) == content


@pytest.mark.parametrize(
    "name",
    ["%41", "a%2Fb", "a+b", "a?b=c", "a#b", "ü é", "~*[]{}|^`\"'<>", "a b ", "a:b;c,d@e!$&()=", ".a", "x..y", "9%"],
)  # fmt: skip
async def test_a_key_names_the_same_object_for_each_of_the_clients_inside(store: S3Store, key: str, name: str) -> None:
    """Bytes go through one library, and everything else through another."""
    odd = f"{key}/{name}"
    await store.put(odd, name.encode())

    assert await store.get(odd) == name.encode()
    assert (await store.head(odd)).size_bytes == len(name.encode())
    assert [info.key for info in await store.list(key + "/")] == [odd]
    await store.delete(odd)
    assert not await store.exists(odd)
