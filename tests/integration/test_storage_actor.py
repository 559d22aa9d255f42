"""The storage actors on a real Ray, over the embedded S3 server."""

from __future__ import annotations

import asyncio
import hashlib
import os
import pickle
import secrets
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import ray

from storage import actor
from storage.actor import BlockingStorage, StorageClient, storage_actor_name
from storage.breaker import BreakerMode, Outcome, Permit
from storage.breaker_actor import BREAKER_NAME
from storage.counters import HELD, OPERATIONS, REQUESTS
from storage.embedded import EmbeddedS3
from storage.errors import (
    IntegrityError,
    ObjectNotFound,
    StorageFailed,
    StorageMisconfigured,
    StorageTimeout,
    StorageUnavailable,
)
from storage.objects import ObjectStore, PutItem, StoreMaintenance
from storage.settings import MIB, BreakerSettings, S3Settings
from storage.shared_breaker import Report, SharedPermit

WAIT_S = 30


@pytest.fixture
def namespace(ray_cluster: str) -> str:
    """Of this test's own, because an actor keeps the settings that it was created with."""
    return f"test-{secrets.token_hex(4)}"


@pytest.fixture
def client(embedded_s3: EmbeddedS3, namespace: str) -> StorageClient:
    return StorageClient(embedded_s3.settings(), namespace=namespace)


@pytest.fixture
def key() -> str:
    return f"raylora/{secrets.token_hex(6)}/a"


@pytest.fixture(autouse=True)
def actors_end(ray_cluster: str, namespace: str) -> object:
    """Detached actors outlive their test otherwise."""
    yield
    for entry in ray.util.list_named_actors(all_namespaces=True):
        if entry["namespace"] == namespace:
            ray.kill(ray.get_actor(entry["name"], namespace=namespace))


def this_nodes_actor(namespace: str) -> ray.actor.ActorHandle:
    return ray.get_actor(storage_actor_name(ray.get_runtime_context().get_node_id()), namespace=namespace)


def breaker_is_there(namespace: str) -> bool:
    return {"name": BREAKER_NAME, "namespace": namespace} in ray.util.list_named_actors(all_namespaces=True)


async def eventually(condition: Callable[[], bool | Awaitable[bool]]) -> None:
    async with asyncio.timeout(WAIT_S):
        while True:
            holds = condition()
            if holds if isinstance(holds, bool) else await holds:
                return
            await asyncio.sleep(0.05)


async def test_every_operation_works_through_the_actor(client: StorageClient, key: str, tmp_path: Path) -> None:
    assert isinstance(client, ObjectStore)
    assert isinstance(client, StoreMaintenance)
    await client.ensure_bucket()
    assert (await client.capabilities()).ranged_reads
    assert await client.list_uploads(key.rpartition("/")[0] + "/") == []
    await client.abort_upload(key, "no-such-upload")
    info = await client.put(key, b"1234", content_type="text/plain")
    assert (await client.put_many([PutItem(key + "2", b"2")]))[0].error is None
    await client.copy(key, key + "3")
    down = await client.download_file(key, tmp_path / "file")
    await client.upload_file(tmp_path / "file", key + "4")

    assert (info.sha256, info.content_type) == ((head := await client.head(key)).sha256, head.content_type)
    assert down.sha256 == hashlib.sha256(b"1234").hexdigest()
    assert await client.get(key + "4") == b"1234"
    assert [found.key for found in await client.list(key.rpartition("/")[0] + "/")] == [key + n for n in ("", *"234")]
    assert "X-Amz-Signature" in await client.presign_get(key)
    assert "X-Amz-Signature" in await client.presign_put(key)
    await client.delete(key)
    assert await client.delete_many([key + "2"]) == 1
    assert not await client.exists(key)
    health = await client.health()
    assert (health.ok, health.breaker) == (True, "closed")


async def test_large_bytes_survive_the_way(client: StorageClient, key: str) -> None:
    data = secrets.token_bytes(5 * MIB)

    await client.put(key, data)

    assert await client.get(key, expected_sha256=hashlib.sha256(data).hexdigest()) == data


async def test_errors_arrive_as_they_were_raised(client: StorageClient, key: str) -> None:
    with pytest.raises(ObjectNotFound) as missing:
        await client.get(key)
    assert type(missing.value) is ObjectNotFound
    assert missing.value.key == key
    await client.put(key, b"1")
    with pytest.raises(IntegrityError):
        await client.get(key, expected_sha256=hashlib.sha256(b"2").hexdigest())
    with pytest.raises(FileNotFoundError):
        await client.upload_file(Path("/missing/file"), key)


async def test_without_its_socket_the_actor_is_called_through_ray(
    client: StorageClient, key: str, tmp_path: Path
) -> None:
    data = secrets.token_bytes(2 * MIB)
    identity = await (await client._actor()).handle.identify.remote()
    identity.socket.unlink()

    await client.put(key, data)
    assert await client.get(key) == data
    assert [info.key for info in await client.list(key.rpartition("/")[0] + "/")] == [key]
    with pytest.raises(ObjectNotFound):
        await client.get(key + "2")
    (tmp_path / "file").write_bytes(b"1")
    assert (await client.upload_file(tmp_path / "file", key + "3")).size_bytes == 1
    assert (await client.put_many([PutItem(key + "4", data)]))[0].error is None


async def test_a_client_finds_the_successor_of_a_killed_actor(client: StorageClient, namespace: str, key: str) -> None:
    await client.put(key, b"1")
    ray.kill(this_nodes_actor(namespace), no_restart=True)

    assert await client.get(key) == b"1"


async def test_a_call_survives_the_restart_of_its_actor(client: StorageClient, namespace: str, key: str) -> None:
    await client.put(key, b"1")
    ray.kill(this_nodes_actor(namespace), no_restart=False)

    assert await client.get(key) == b"1"


async def test_all_clients_of_a_node_share_one_actor(client: StorageClient, namespace: str, key: str) -> None:
    await asyncio.gather(client.exists(key), pickle.loads(pickle.dumps(client)).exists(key))  # noqa: S301

    names = [a["name"] for a in ray.util.list_named_actors(all_namespaces=True) if a["namespace"] == namespace]
    assert len([name for name in names if name.startswith("storage@")]) == 1


async def test_a_client_works_inside_other_actors_and_tasks(client: StorageClient, key: str) -> None:
    await client.put(key, b"1")

    @ray.remote(num_cpus=0)
    class Reader:
        def __init__(self, client: StorageClient) -> None:
            self._client = client

        async def read(self, name: str) -> bytes:
            return await self._client.get(name)

    @ray.remote(num_cpus=0)
    def read(client: StorageClient, name: str) -> bytes:
        return BlockingStorage(client).get(name)

    reader = Reader.remote(client)

    assert await reader.read.remote(key) == b"1"
    assert await read.remote(client, key) == b"1"


async def test_other_settings_than_the_actors_are_noticed(
    client: StorageClient, embedded_s3: EmbeddedS3, namespace: str, key: str
) -> None:
    await client.exists(key)
    other = StorageClient(embedded_s3.settings().model_copy(update={"bucket": "other"}), namespace=namespace)

    with pytest.raises(StorageMisconfigured):
        await other.exists(key)
    assert (await other.health()).detail == "storage_misconfigured"
    (outcome,) = await other.put_many([PutItem(key, b"1")])
    assert isinstance(outcome.error, StorageMisconfigured)


async def test_a_call_to_an_actor_that_hangs_ends(
    embedded_s3: EmbeddedS3, namespace: str, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = StorageClient(embedded_s3.settings().model_copy(update={"deadline_s": 1.0}), namespace=namespace)
    await client.put(key, b"1")
    monkeypatch.setattr(actor, "DEADLINE_GRACE_S", 0.2)
    monkeypatch.setattr(actor, "PULSE_WITHIN_S", 0.2)
    pid = await this_nodes_actor(namespace).__ray_call__.remote(lambda _: os.getpid())
    os.kill(pid, signal.SIGSTOP)
    try:
        for call in (client.head(key), client.list(key.rpartition("/")[0] + "/")):
            with pytest.raises(StorageTimeout):
                await call
    finally:
        os.kill(pid, signal.SIGCONT)

    assert await client.get(key) == b"1"


def dead_settings(embedded_s3: EmbeddedS3) -> S3Settings:
    return embedded_s3.settings().model_copy(update={"endpoint_url": "http://127.0.0.1:9", "backoff_max_s": 0.0})


async def test_a_dead_backend_opens_the_breaker_and_health_says_so(
    embedded_s3: EmbeddedS3, namespace: str, key: str
) -> None:
    client = StorageClient(dead_settings(embedded_s3), BreakerSettings(failure_threshold=1), namespace=namespace)

    with pytest.raises(StorageUnavailable) as rejected:
        await client.get(key)
    health = await client.health()

    # It was tried, and the breaker opened before the retry.
    assert rejected.value.attempts == 1
    assert 0 < rejected.value.retry_after_s <= 60
    with pytest.raises(StorageUnavailable) as refused:
        await client.get(key)
    assert refused.value.attempts == 0
    assert (health.ok, health.breaker, health.detail) == (False, "open", "storage_unavailable")
    assert health.retry_after_s is not None


async def test_an_actor_reports_to_the_shared_breaker_and_obeys_it(
    embedded_s3: EmbeddedS3, namespace: str, key: str
) -> None:
    many = 1000
    settings = dead_settings(embedded_s3).model_copy(update={"retry_budget": 0})
    breaker = BreakerSettings(failure_threshold=many, sync_interval_s=0.1)
    client = StorageClient(settings, breaker, namespace=namespace)
    await client.presign_get(key)
    await eventually(lambda: breaker_is_there(namespace))
    shared = ray.get_actor(BREAKER_NAME, namespace=namespace)

    async def failures_arrive() -> bool:
        with pytest.raises(StorageFailed):
            await client.get(key)
        return bool((await shared.report.remote([])).breaker.consecutive_failures)

    async def client_is_rejected() -> bool:
        with pytest.raises((StorageFailed, StorageUnavailable)) as raised:
            await client.get(key)
        return raised.type is StorageUnavailable

    await eventually(failures_arrive)
    state = await shared.report.remote([])
    failure = Report(SharedPermit(state.epoch, Permit(state.breaker.generation)), Outcome.FAILURE)
    await shared.report.remote([failure] * many)
    await eventually(client_is_rejected)


async def test_without_the_breaker_actor_storage_goes_on(client: StorageClient, namespace: str, key: str) -> None:
    await client.put(key, b"1")
    await eventually(lambda: breaker_is_there(namespace))
    ray.kill(ray.get_actor(BREAKER_NAME, namespace=namespace), no_restart=True)

    assert await client.get(key) == b"1"
    await eventually(lambda: breaker_is_there(namespace))


async def test_health_does_not_wait_behind_transfers(embedded_s3: EmbeddedS3, namespace: str, key: str) -> None:
    settings = embedded_s3.settings().model_copy(update={"max_concurrency": 1})
    client = StorageClient(settings, namespace=namespace)
    await client.exists(key)
    writes = [asyncio.create_task(client.put(f"{key}{number}", bytes(MIB))) for number in range(20)]
    await asyncio.sleep(0)

    health = await client.health()

    assert health.ok
    assert not all(write.done() for write in writes)
    await asyncio.gather(*writes)


async def test_what_is_held_for_calls_is_told_and_free_when_they_have_ended(
    embedded_s3: EmbeddedS3, namespace: str, key: str
) -> None:
    settings = embedded_s3.settings().model_copy(update={"max_concurrency": 1})
    client = StorageClient(settings, namespace=namespace)
    await client.exists(key)
    before = (await client.counts())[HELD]
    writes = [asyncio.create_task(client.put(f"{key}{number}", bytes(3 * MIB))) for number in range(20)]

    async def they_are_held() -> bool:
        held = (await client.counts())[HELD]
        return held["attempts"] == 1 and held["request_bytes"] >= 3 * MIB and held["tasks"] > before["tasks"]

    async def all_is_free() -> bool:
        held = (await client.counts())[HELD]
        return (held["attempts"], held["request_bytes"], held["tasks"]) == (0, 0, before["tasks"])

    await eventually(they_are_held)
    for write in writes[::2]:
        write.cancel()
    await asyncio.gather(*writes, return_exceptions=True)
    await eventually(all_is_free)


async def test_an_operator_decides_for_the_whole_cluster_and_lets_it_decide_again(
    client: StorageClient, namespace: str, key: str
) -> None:
    await client.put(key, b"1")
    opened = await client.set_breaker(BreakerMode.FORCED_OPEN)
    with pytest.raises(StorageUnavailable):
        await client.get(key)
    health = await client.health()
    state = await ray.get_actor(BREAKER_NAME, namespace=namespace).report.remote([])
    await client.set_breaker(BreakerMode.AUTOMATIC)

    assert opened.mode is state.setting.mode is BreakerMode.FORCED_OPEN
    assert (health.ok, health.breaker, health.breaker_mode) == (False, "open", "forced_open")
    assert await client.get(key) == b"1"
    counts = await client.counts()
    assert counts[OPERATIONS]["get,storage_unavailable"] == 1
    assert counts[REQUESTS]["get,get_object"] == 1
