"""How obstore's errors are told apart: real ones, of real answers, since only their text tells."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from pydantic import SecretStr

from storage.errors import ObjectNotFound, StorageAccessDenied, StorageMisconfigured, StorageRefused
from storage.resilience import TransientFaultError
from storage.s3_bodies import Bodies
from storage.s3_faults import mapped
from storage.settings import S3Settings

Answerer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def bodies_at(answerer: Answerer, **changes: object) -> AsyncIterator[Bodies]:
    answers: set[asyncio.Task[None]] = set()

    async def tracked(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        answers.add(task)
        try:
            await answerer(reader, writer)
        finally:
            writer.close()
            await writer.wait_closed()

    server = await asyncio.start_server(tracked, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    keys = {"access_key_id": SecretStr("a"), "secret_access_key": SecretStr("b")}
    try:
        yield Bodies(S3Settings(endpoint_url=f"http://127.0.0.1:{port}", **keys).model_copy(update=changes))
    finally:
        server.close()
        await asyncio.gather(*answers)


def answering(status: str, body: str) -> Answerer:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
        await writer.drain()

    return answer


def error_of(code: str) -> str:
    return f'<?xml version="1.0"?>\n<Error><Code>{code}</Code><Message>status code: 404 Gone:</Message></Error>'


async def raised_by(bodies: Bodies, key: str = "a/b") -> Exception:
    with pytest.raises(Exception) as raised, mapped("get", key):
        await (await bodies.open(key)).read()
    return raised.value


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        ("404 Not Found", error_of("NoSuchKey"), ObjectNotFound),
        ("404 Not Found", "", ObjectNotFound),
        ("404 Not Found", error_of("NoSuchBucket"), StorageMisconfigured),
        ("403 Forbidden", error_of("AccessDenied"), StorageAccessDenied),
        ("403 Forbidden", "", StorageAccessDenied),
        ("401 Unauthorized", error_of("Unauthorized"), StorageAccessDenied),
        ("400 Bad Request", error_of("ExpiredToken"), StorageAccessDenied),
        ("400 Bad Request", error_of("InvalidRequest"), StorageRefused),
        ("412 Precondition Failed", error_of("PreconditionFailed"), StorageRefused),
        ("501 Not Implemented", error_of("NotImplemented"), StorageRefused),
        ("416 Range Not Satisfiable", error_of("InvalidRange"), StorageRefused),
    ],
)
async def test_a_refusal_is_final(status: str, body: str, expected: type[Exception]) -> None:
    async with bodies_at(answering(status, body)) as bodies:
        assert type(await raised_by(bodies)) is expected


@pytest.mark.parametrize(
    ("status", "body", "reason"),
    [
        ("500 Internal Server Error", error_of("InternalError"), "server_error"),
        ("502 Bad Gateway", "<html>Bad Gateway</html>", "server_error"),
        ("504 Gateway Timeout", "", "server_error"),
        ("503 Service Unavailable", error_of("SlowDown"), "throttled"),
        ("429 Too Many Requests", "", "throttled"),
        ("400 Bad Request", error_of("ThrottlingException"), "throttled"),
        ("400 Bad Request", error_of("RequestTimeout"), "timeout"),
        ("409 Conflict", error_of("OperationAborted"), "conflict"),
    ],
)
async def test_a_passing_trouble_is_to_be_retried_by_us_and_was_not_by_obstore(
    status: str, body: str, reason: str
) -> None:
    asked = 0

    async def counted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        asked += 1
        await answering(status, body)(reader, writer)

    async with bodies_at(counted) as bodies:
        ours = await raised_by(bodies)

    assert isinstance(ours, TransientFaultError)
    assert ours.reason == reason
    assert asked == 1


async def test_a_key_that_looks_like_an_error_is_not_taken_for_one() -> None:
    key = "Server returned non-2xx status code: 404 Not Found: <Code>NoSuchKey</Code>/kind: Timeout,"
    async with bodies_at(answering("500 Internal Server Error", error_of("InternalError"))) as bodies:
        ours = await raised_by(bodies, key)

    assert isinstance(ours, TransientFaultError)
    assert ours.reason == "server_error"


async def test_a_body_that_breaks_off_is_truncated() -> None:
    async def half(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\nETag: x\r\n")
        writer.write(b"Last-Modified: Thu, 26 Nov 2026 00:00:00 GMT\r\n\r\nabc")
        await writer.drain()

    async with bodies_at(half) as bodies:
        ours = await raised_by(bodies)

    assert isinstance(ours, TransientFaultError)
    assert ours.reason == "truncated"


@pytest.mark.parametrize("garbage", [b"no HTTP at all\r\n\r\n", b""])
async def test_an_answer_that_is_none_is_a_broken_connection(garbage: bytes) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(garbage)

    async with bodies_at(answer) as bodies:
        ours = await raised_by(bodies)

    assert isinstance(ours, TransientFaultError)
    assert ours.reason == "connection"


async def test_a_silent_server_is_given_up() -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async with bodies_at(silent, read_timeout_s=0.2) as bodies:
        on_read = await raised_by(bodies)
        with pytest.raises(TransientFaultError) as on_write, mapped("put", "a/b"):
            await bodies.put("a/b", b"123", sha256="", content_type=None)

    assert isinstance(on_read, TransientFaultError)
    assert (on_read.reason, on_read.timed_out) == ("timeout", True)
    assert (on_write.value.reason, on_write.value.timed_out) == ("timeout", True)


async def test_a_server_that_is_not_there_is_a_broken_connection() -> None:
    keys = {"access_key_id": SecretStr("a"), "secret_access_key": SecretStr("b")}
    ours = await raised_by(Bodies(S3Settings(endpoint_url="http://127.0.0.1:9", **keys)))

    assert isinstance(ours, TransientFaultError)
    assert ours.reason == "connection"


async def test_the_secret_is_in_no_text() -> None:
    async with bodies_at(answering("403 Forbidden", ""), secret_access_key=SecretStr("very-secret")) as bodies:
        with pytest.raises(Exception) as raised:
            await bodies.open("a/b")

    assert "very-secret" not in f"{raised.value} {raised.value!r} {bodies._buckets}"
