"""What holds for every operation of the S3 store, without an S3 server."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from pydantic import SecretStr

from storage import counters
from storage.breaker import BreakerMode, BreakerOpenError, BreakerSnapshot, BreakerState, Outcome
from storage.errors import (
    InvalidKey,
    StorageAccessDenied,
    StorageError,
    StorageFailed,
    StorageMisconfigured,
    StorageRefused,
    StorageTimeout,
    StorageUnavailable,
)
from storage.objects import ObjectStore, PutItem, StoreMaintenance
from storage.s3 import S3Store
from storage.settings import MIB, S3Settings

Operation = Callable[[S3Store, Path], Coroutine[Any, Any, Any]]

OPERATIONS: dict[str, Operation] = {
    "put": lambda store, _: store.put("a", b"1"),
    "put_many": lambda store, _: store.put_many([PutItem("a", b"1")]),
    "get": lambda store, _: store.get("a"),
    "get_view": lambda store, _: store.get_view("a"),
    "head": lambda store, _: store.head("a"),
    "exists": lambda store, _: store.exists("a"),
    "delete": lambda store, _: store.delete("a"),
    "delete_many": lambda store, _: store.delete_many(["a"]),
    "list": lambda store, _: store.list("a/"),
    "copy": lambda store, _: store.copy("a", "b"),
    "upload_file": lambda store, path: store.upload_file(path, "a"),
    "download_file": lambda store, path: store.download_file("a", path.with_name("target")),
    "presign_get": lambda store, _: store.presign_get("a"),
    "presign_put": lambda store, _: store.presign_put("a"),
    "health": lambda store, _: store.health(),
    "ensure_bucket": lambda store, _: store.ensure_bucket(),
    "list_uploads": lambda store, _: store.list_uploads("a/"),
    "abort_upload": lambda store, _: store.abort_upload("a", "1"),
    "capabilities": lambda store, _: store.capabilities(),
}
# Beside the operation's own calls, one that clears away what it leaves.
CLEAN_UPS = {"capabilities": 1}
# They ask no server.
WITHOUT_CALLS = {"aclose", "set_breaker", "counts"}


class RecordingGate:
    """Admits every call as a probe, or none."""

    def __init__(self, *, is_open: bool) -> None:
        self.is_open = is_open
        self.is_probe = True
        self.outcomes: list[Outcome] = []

    async def admit(self) -> RecordingGate:
        if self.is_open:
            raise BreakerOpenError(42)
        return self

    def settle(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)

    def snapshot(self) -> BreakerSnapshot:
        return BreakerSnapshot(BreakerState.OPEN if self.is_open else BreakerState.HALF_OPEN, 0, 0, 42)

    async def force(self, mode: BreakerMode) -> BreakerSnapshot:
        self.is_open = mode is BreakerMode.FORCED_OPEN
        return self.snapshot()


async def no_wait(_: float) -> None:
    return None


@pytest.fixture
async def silent_port() -> AsyncIterator[int]:
    """A server that accepts, reads and never answers."""
    writers: list[asyncio.StreamWriter] = []

    async def swallow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        while await reader.read(65536):
            continue

    server = await asyncio.start_server(swallow, "127.0.0.1", 0)
    yield server.sockets[0].getsockname()[1]
    for writer in writers:
        writer.close()
    server.close()
    await server.wait_closed()


def settings_at(port: int, **changes: Any) -> S3Settings:
    values = {
        "endpoint_url": f"http://127.0.0.1:{port}",
        "access_key_id": SecretStr("key"),
        "secret_access_key": SecretStr("secret"),
        **changes,
    }
    return S3Settings.model_validate(values)


def store_at(port: int, gate: RecordingGate, **changes: Any) -> S3Store:
    return S3Store(settings_at(port, **changes), gate=gate, sleep=no_wait)


@pytest.fixture
def small_file(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(b"1")
    return path


def test_the_operations_listed_here_are_all_there_are() -> None:
    public = {
        name for name, member in inspect.getmembers(S3Store, inspect.iscoroutinefunction) if not name.startswith("_")
    }

    promised = {*vars(ObjectStore), *vars(StoreMaintenance)}

    assert public - WITHOUT_CALLS == set(OPERATIONS)
    assert {name for name in promised if not name.startswith("_")} <= public


# What asks the server for nothing, whatever the breaker says.
ASKING = [name for name in OPERATIONS if name != "presign_get"]


@pytest.mark.parametrize("name", ASKING)
async def test_an_open_breaker_stops_every_operation_before_it_calls(name: str, small_file: Path) -> None:
    gate = RecordingGate(is_open=True)
    async with store_at(9, gate) as store:
        if name == "health":
            health = await store.health()
            assert (health.ok, health.breaker, health.retry_after_s) == (False, "open", 42)
            assert health.detail == "storage_unavailable"
        elif name == "put_many":
            (outcome,) = await store.put_many([PutItem("a", b"1")])
            assert isinstance(outcome.error, StorageUnavailable)
        else:
            with pytest.raises(StorageUnavailable) as rejected:
                await OPERATIONS[name](store, small_file)
            assert rejected.value.retry_after_s == 42
    assert gate.outcomes == []


@pytest.mark.parametrize("name", ASKING)
async def test_every_operation_has_timed_attempts_that_are_retried_and_counted(
    name: str, small_file: Path, silent_port: int
) -> None:
    gate = RecordingGate(is_open=False)
    async with store_at(silent_port, gate, attempts_max=2, attempt_timeout_s=0.05) as store:
        if name == "health":
            assert (await store.health()).detail == "storage_timeout"
        elif name == "put_many":
            (outcome,) = await store.put_many([PutItem("a", b"1")])
            assert isinstance(outcome.error, StorageTimeout)
        else:
            with pytest.raises(StorageTimeout):
                await OPERATIONS[name](store, small_file)
    assert gate.outcomes == [Outcome.FAILURE, Outcome.FAILURE] * (1 + CLEAN_UPS.get(name, 0))


@pytest.mark.parametrize("name", ASKING)
async def test_every_operation_has_a_deadline(name: str, small_file: Path, silent_port: int) -> None:
    gate = RecordingGate(is_open=False)
    bounds = {"deadline_s": 0.05, "health_deadline_s": 0.05, "throughput_min_bytes_per_s": 1024 * MIB}
    async with store_at(silent_port, gate, **bounds) as store:
        if name == "health":
            assert (await store.health()).detail == "storage_timeout"
        elif name == "put_many":
            (outcome,) = await store.put_many([PutItem("a", b"1")])
            assert isinstance(outcome.error, StorageTimeout)
        else:
            with pytest.raises(StorageTimeout):
                await OPERATIONS[name](store, small_file)
    assert gate.outcomes == [Outcome.FAILURE] * (1 + CLEAN_UPS.get(name, 0))


@pytest.mark.parametrize(
    ("is_open", "is_probe", "outcomes"),
    [(False, False, [Outcome.NEUTRAL]), (False, True, [Outcome.NEUTRAL]), (True, False, [])],
    ids=["closed", "half-open", "open"],
)
async def test_a_url_to_read_is_signed_whatever_the_breaker_says_and_tells_it_nothing(
    is_open: bool, is_probe: bool, outcomes: list[Outcome], silent_port: int
) -> None:
    gate = RecordingGate(is_open=is_open)
    gate.is_probe = is_probe
    async with store_at(silent_port, gate) as store:
        url = await store.presign_get("a/b", filename='Фото "1".png')

    assert url.startswith(f"http://127.0.0.1:{silent_port}/raylora/a/b?")
    assert gate.outcomes == outcomes


async def test_urls_are_signed_for_the_address_that_others_reach() -> None:
    gate = RecordingGate(is_open=False)
    gate.is_probe = False
    async with store_at(9, gate, public_endpoint_url="https://files.example.org") as store:
        assert (await store.presign_put("a")).startswith("https://files.example.org/raylora/a?")


@pytest.mark.parametrize("expires_s", [0, -1, 7 * 24 * 3600 + 1])
async def test_an_expiry_that_no_server_accepts_is_refused(expires_s: int) -> None:
    async with store_at(9, RecordingGate(is_open=False)) as store:
        with pytest.raises(ValueError, match="expires_s"):
            await store.presign_get("a", expires_s=expires_s)


@pytest.mark.parametrize("name", ["put", "get", "head", "delete", "presign_get", "presign_put"])
async def test_a_key_that_some_server_cannot_hold_is_never_sent(name: str) -> None:
    gate = RecordingGate(is_open=False)
    async with store_at(9, gate) as store:
        with pytest.raises(InvalidKey):
            await (store.put("../x", b"1") if name == "put" else getattr(store, name)("../x"))
    assert gate.outcomes == []


async def test_a_call_that_rclone_would_misunderstand_is_refused_before_it_is_sent() -> None:
    async with store_at(9, RecordingGate(is_open=False)) as store:
        client = await store._clients.internal()
        for call in (
            client.put_object_acl(Bucket="b", Key="k", ACL="private"),
            client.put_object_tagging(Bucket="b", Key="k", Tagging={"TagSet": []}),
            client.delete_object_tagging(Bucket="b", Key="k"),
        ):
            with pytest.raises(StorageMisconfigured):
                await call


@pytest.mark.parametrize("missing", ["access_key_id", "secret_access_key"])
async def test_a_local_server_without_keys_is_a_misconfiguration(missing: str) -> None:
    async with store_at(9, RecordingGate(is_open=False), **{missing: None}) as store:
        with pytest.raises(StorageMisconfigured):
            await store.head("a")


async def test_an_operator_opens_and_closes_the_breaker_without_asking_the_server() -> None:
    async with S3Store(settings_at(9)) as store:
        opened = await store.set_breaker(BreakerMode.FORCED_OPEN)
        with pytest.raises(StorageUnavailable):
            await store.head("a")
        health = await store.health()
        closed = await store.set_breaker(BreakerMode.AUTOMATIC)

    assert (opened.state, opened.mode) == (BreakerState.OPEN, BreakerMode.FORCED_OPEN)
    assert (health.ok, health.breaker, health.breaker_mode) == (False, "open", "forced_open")
    assert (closed.state, closed.mode) == (BreakerState.CLOSED, BreakerMode.AUTOMATIC)


class Deleting:
    """A server that answers each call to delete many with `codes` of the keys `a`, `b` and so on, one answer after
    another, and the last one for ever."""

    def __init__(self, *answers: Sequence[str]) -> None:
        self._answers = list(answers)
        self.asked = 0

    async def answer(self, request: web.Request) -> web.Response:
        await request.read()
        codes = self._answers[min(self.asked, len(self._answers) - 1)]
        self.asked += 1
        errors = "".join(
            f"<Error><Key>{key}</Key><Code>{code}</Code></Error>"
            for key, code in zip("abc", codes, strict=False)
            if code
        )
        return web.Response(text=f"<DeleteResult>{errors}</DeleteResult>", content_type="text/xml")


@asynccontextmanager
async def served(deleting: Deleting) -> AsyncIterator[int]:
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", deleting.answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield int(runner.addresses[0][1])
    await runner.cleanup()


@pytest.mark.parametrize(
    ("codes", "raised", "outcomes"),
    [
        (["AccessDenied"], StorageAccessDenied, [Outcome.SUCCESS]),
        (["MethodNotAllowed"], StorageRefused, [Outcome.SUCCESS]),
        (["NoSuchBucket"], StorageMisconfigured, [Outcome.SUCCESS]),
        (["SlowDown"], StorageFailed, [Outcome.FAILURE] * 3),
        (["InternalError"], StorageFailed, [Outcome.FAILURE] * 3),
        (["AccessDenied", "InternalError"], StorageFailed, [Outcome.FAILURE] * 3),
        (["OperationAborted", "SlowDown"], StorageFailed, [Outcome.FAILURE] * 3),
    ],
)
async def test_a_key_that_is_not_deleted_fails_as_its_code_would_alone(
    codes: list[str], raised: type[StorageError], outcomes: list[Outcome]
) -> None:
    gate, deleting = RecordingGate(is_open=False), Deleting(codes)
    async with served(deleting) as port, store_at(port, gate, attempts_max=3) as store:
        with pytest.raises(StorageError) as error:
            await store.delete_many(["a", "b", "c"])

    assert type(error.value) is raised
    assert gate.outcomes == outcomes
    assert deleting.asked == len(outcomes)


@pytest.mark.parametrize("answers", [[["NoSuchKey", ""]], [["", "SlowDown"], []]])
async def test_many_are_deleted_where_none_is_left_or_another_attempt_deletes_the_rest(
    answers: list[list[str]],
) -> None:
    deleting = Deleting(*answers)
    async with served(deleting) as port, store_at(port, RecordingGate(is_open=False)) as store:
        assert await store.delete_many(["a", "b"]) == 2

    assert deleting.asked == len(answers)


async def test_what_happens_is_counted(silent_port: int) -> None:
    gate = RecordingGate(is_open=False)
    async with store_at(silent_port, gate, attempts_max=2, attempt_timeout_s=0.05) as store:
        with pytest.raises(StorageTimeout):
            await store.head("a")
        gate.is_open = True
        with pytest.raises(StorageUnavailable):
            await store.head("a")
        counts = await store.counts()

    assert counts[counters.ATTEMPTS] == {"head,failure": 2}
    assert counts[counters.RETRIES] == {"head,timeout": 1}
    assert counts[counters.OPERATIONS] == {"head,storage_timeout": 1, "head,storage_unavailable": 1}
    assert counts[counters.REQUESTS] == {"head,head_object": 2}
    assert counts[counters.BREAKER_STATE] == {"": 2}


class Pages:
    """A server of pages that each take a while: of keys, of uploads, of removals."""

    def __init__(self, pause_s: float) -> None:
        self.pause_s = pause_s

    async def send(self, _: str, __: str | None, method: str, ___: object) -> dict[str, object]:
        await asyncio.sleep(self.pause_s)
        if method == "delete_objects":
            return {}
        if method == "list_multipart_uploads":
            return {"IsTruncated": True, "NextKeyMarker": "a", "NextUploadIdMarker": "1"}
        return {"IsTruncated": True, "NextContinuationToken": "a"}


@pytest.mark.parametrize(
    ("name", "operation"),
    {
        "list": lambda store: store.list("a/"),
        "list_uploads": lambda store: store.list_uploads("a/"),
        "delete_many": lambda store: store.delete_many([f"a/{n}" for n in range(200_000)]),
    }.items(),
)
async def test_an_operation_of_many_calls_has_one_deadline(
    name: str, operation: Callable[[S3Store], Coroutine[Any, Any, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.s3.KEYS_PER_S_MIN", 10**9)
    pages = Pages(0.1)
    async with store_at(9, RecordingGate(is_open=False), deadline_s=0.5) as store:
        monkeypatch.setattr(store._calls, "send", pages.send)
        with pytest.raises(StorageTimeout) as timed_out:
            await operation(store)

    assert timed_out.value.operation == name


async def test_small_files_wait_for_room_before_they_are_read(tmp_path: Path, silent_port: int) -> None:
    (tmp_path / "file").write_bytes(bytes(MIB))
    reads: list[int] = []
    is_full = asyncio.Event()

    async def note(_: str, __: str, data: bytes, *___: object) -> dict[str, str]:
        reads.append(len(data))
        if len(reads) == 3:
            is_full.set()
        await asyncio.Event().wait()
        return {}

    async with store_at(silent_port, RecordingGate(is_open=False), bytes_in_flight_max=3 * MIB) as store:
        store._calls.put = note  # type: ignore[method-assign, assignment]
        uploads = [asyncio.create_task(store.upload_file(tmp_path / "file", f"a/{n}")) for n in range(8)]
        async with asyncio.timeout(10):
            await is_full.wait()
        held = store._in_flight.held_bytes
        for upload in uploads:
            upload.cancel()
        await asyncio.gather(*uploads, return_exceptions=True)

        assert (len(reads), held) == (3, 3 * MIB)
        assert store._in_flight.held_bytes == 0
