"""The server of the socket for HAProxy: who may open it, whom it refuses, how its requests end."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from starlette.types import Message, Receive, Scope, Send

from serve_app.ingress.door import Door, WhileWanted
from serve_app.ingress.request_log import LineFile, RayMetrics, RequestLog
from serve_app.testing import LocalServer
from storage.own_sockets import listen_at

WAIT_S = 10


class Slow:
    """An application whose requests end when they may, and that tells how they ended."""

    def __init__(self) -> None:
        self.may_end, self.begun, self.cancelled = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.begun.set()
        try:
            await self.may_end.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})


@pytest.fixture
def folder() -> Iterator[Path]:
    """With a short path: a socket's is limited to about 100 bytes."""
    with tempfile.TemporaryDirectory(prefix="rl", dir="/tmp") as name:
        yield Path(name)


@pytest.fixture
def request_log(tmp_path: Path) -> RequestLog:
    return RequestLog(LineFile(tmp_path / "access.log"), RayMetrics("replica"))


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


@asynccontextmanager
async def client(path: Path) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.AsyncHTTPTransport(uds=str(path))
    async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=WAIT_S) as http:
        yield http


async def test_the_whole_application_is_behind_it_and_only_this_user_opens_it(
    server: LocalServer, folder: Path, request_log: RequestLog
) -> None:
    door = Door(folder / "a.door", places=8, drain_s=1, log=request_log)
    await door.open(server.app)
    async with client(folder / "a.door") as http:
        assert (await http.get("/livez")).json() == {"alive": True}
        assert (await http.get("/v2/ep/health")).status_code == 401
    assert (folder / "a.door").stat().st_mode & 0o077 == 0
    await door.close()
    assert names(folder) == []
    assert not door.has_failed


async def test_more_than_its_places_are_told_to_come_again(folder: Path, request_log: RequestLog) -> None:
    app = Slow()
    door = Door(folder / "a.door", places=2, drain_s=1, log=request_log)
    await door.open(app)
    async with client(folder / "a.door") as http, asyncio.TaskGroup() as group:
        first = group.create_task(http.get("/a"))
        await app.begun.wait()
        app.begun.clear()
        second = group.create_task(http.get("/b"))
        await app.begun.wait()
        refused = await http.get("/v2/ep/health")
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "1"
        assert refused.json()["error_type"] == "service_unavailable"
        app.may_end.set()
        assert [(await task).status_code for task in (first, second)] == [200, 200]
        assert (await http.get("/again")).status_code == 200
    await door.close()


async def test_closing_waits_for_what_is_under_way(folder: Path, request_log: RequestLog) -> None:
    app = Slow()
    door = Door(folder / "a.door", places=2, drain_s=WAIT_S, log=request_log)
    await door.open(app)
    async with client(folder / "a.door") as http, asyncio.TaskGroup() as group:
        answer = group.create_task(http.get("/"))
        await app.begun.wait()
        closing = group.create_task(door.close())
        await asyncio.sleep(0)
        app.may_end.set()
        assert (await answer).text == "ok"
        await closing


async def test_what_takes_longer_than_the_drain_is_told_so(folder: Path, request_log: RequestLog) -> None:
    app = Slow()
    door = Door(folder / "a.door", places=2, drain_s=0, log=request_log)
    await door.open(app)
    async with client(folder / "a.door") as http, asyncio.TaskGroup() as group:
        answer = group.create_task(http.get("/v2/ep/health"))
        await app.begun.wait()
        await door.close()
        assert app.cancelled.is_set()
        assert (await answer).status_code == 503
        assert (await answer).headers["retry-after"] == "1"


async def test_a_socket_of_a_killed_replica_goes_when_the_next_one_opens(folder: Path, request_log: RequestLog) -> None:
    listen_at(folder / "killed.door", 1).close()
    door = Door(folder / "a.door", places=2, drain_s=0, log=request_log)
    await door.open(Slow())
    assert names(folder) == ["a.door"]
    await door.close()


@pytest.fixture
def open_folder(folder: Path) -> Path:
    folder.chmod(0o755)
    return folder


async def test_a_folder_that_others_can_enter_is_refused(open_folder: Path, request_log: RequestLog) -> None:
    with pytest.raises(PermissionError):
        await Door(open_folder / "a.door", places=2, drain_s=0, log=request_log).open(Slow())


async def test_on_a_node_without_haproxy_nothing_is_opened(folder: Path, request_log: RequestLog) -> None:
    door = Door(folder / "other" / "a.door", places=2, drain_s=0, log=request_log)
    await door.open(Slow())
    assert not door.has_failed
    await door.close()


@pytest.mark.parametrize(
    "request_text",
    [b"GET / HTTP/1.1\r\nhost: x\r\n\r\n", b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}"],
    ids=["empty", "with a body"],
)
async def test_a_request_is_cancelled_when_its_client_has_gone(
    folder: Path, request_log: RequestLog, request_text: bytes
) -> None:
    app = Slow()
    door = Door(folder / "a.door", places=2, drain_s=0, log=request_log)
    await door.open(WhileWanted(app, patience_s=0))
    _, writer = await asyncio.open_unix_connection(str(folder / "a.door"))
    writer.write(request_text)
    await app.begun.wait()
    writer.close()
    async with asyncio.timeout(WAIT_S):
        await app.cancelled.wait()
    await door.close()


class Talk:
    """Both sides of one request, without a server."""

    def __init__(self, *messages: Message) -> None:
        self.coming: asyncio.Queue[Message] = asyncio.Queue()
        for message in messages:
            self.coming.put_nowait(message)
        self.sent: list[Message] = []

    async def send(self, message: Message) -> None:
        self.sent.append(message)


def body(data: bytes, *, more: bool) -> Message:
    return {"type": "http.request", "body": data, "more_body": more}


async def test_a_body_that_comes_slowly_reaches_the_application_whole() -> None:
    seen: list[bytes] = []

    async def app(_: Scope, receive: Receive, __: Send) -> None:
        more = True
        while more:
            message = await receive()
            seen.append(message["body"])
            more = message["more_body"]

    talk = Talk()
    scope = {"type": "http", "path": "/"}
    request = asyncio.create_task(WhileWanted(app, patience_s=0)(scope, talk.coming.get, talk.send))
    for number in range(5):
        await asyncio.sleep(0.01)
        talk.coming.put_nowait(body(b"%d" % number, more=number < 4))
    await request
    assert seen == [b"0", b"1", b"2", b"3", b"4"]


async def test_work_behind_a_reply_goes_on_when_the_reply_has_ended() -> None:
    done = asyncio.Event()

    async def app(_: Scope, __: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})
        await asyncio.sleep(0.05)
        done.set()

    talk = Talk(body(b"", more=False), *[{"type": "http.disconnect"}] * 3)
    await WhileWanted(app, patience_s=0)({"type": "http", "path": "/"}, talk.coming.get, talk.send)
    assert done.is_set()


async def test_what_escapes_the_application_is_logged_without_its_text(caplog: pytest.LogCaptureFixture) -> None:
    async def app(*_: object) -> None:
        raise ValueError("https://secret")

    talk = Talk(body(b"", more=False))
    with pytest.raises(ValueError, match="secret"):
        await WhileWanted(app)({"type": "http", "path": "/"}, talk.coming.get, talk.send)
    assert "ValueError" in caplog.text
    assert "secret" not in json.dumps([record.getMessage() for record in caplog.records])
