"""Calls over the socket: what arrives, what happens when either side goes away."""

from __future__ import annotations

import asyncio
import errno
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage import node_channel
from storage.channel_connection import BODY_BYTES_MIN, HEAD, SHARED_BYTES, ChannelClosedError
from storage.errors import ObjectNotFound
from storage.node_channel import ChannelClient, ChannelMissingError, ChannelServer, Serve

WAIT_S = 10


@pytest.fixture(autouse=True)
def own_temporary_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("s")
    monkeypatch.setattr(node_channel.tempfile, "gettempdir", lambda: str(folder))
    return folder


async def echo(method: str, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> Any:
    return arguments[0] if method == "first" else (method, tuple(arguments), dict(keywords))


@asynccontextmanager
async def serving(serve: Serve, *, bytes_max: int = 1 << 20) -> AsyncIterator[ChannelClient]:
    server = ChannelServer(serve, bytes_max=bytes_max)
    path = await server.start()
    assert path is not None
    try:
        yield ChannelClient(path)
    finally:
        await server.aclose()
    assert not path.exists()


async def test_a_call_arrives_with_all_that_it_has() -> None:
    async with serving(echo) as client:
        assert await client.call("put", ("k", None, 3.5), {"content_type": "text/plain"}) == (
            "put",
            ("k", None, 3.5),
            {"content_type": "text/plain"},
        )


SIZES = st.sampled_from(
    [0, 1, BODY_BYTES_MIN - 1, BODY_BYTES_MIN, 65_536, 300_000, SHARED_BYTES, SHARED_BYTES + 1, 3_000_000]
)


@settings(max_examples=30)
@given(sizes=st.lists(SIZES, min_size=1, max_size=4), as_view=st.booleans(), shares=st.booleans())
def test_bytes_of_any_size_come_back_whole_one_call_after_another(
    sizes: list[int], as_view: bool, shares: bool
) -> None:
    async def serve(_: str, arguments: Sequence[Any], __: Mapping[str, Any]) -> Any:
        return memoryview(arguments[0]) if as_view else arguments[0]

    async def run() -> None:
        async with serving(serve) as client:
            for number, size in enumerate(sizes):
                data = bytes([number + 1]) * size
                assert await client.call("get", (data,), {}) == data

    with pytest.MonkeyPatch.context() as patch:
        if not shares:
            patch.delattr(os, "memfd_create", raising=False)
        asyncio.run(run())


async def test_two_large_arguments_both_arrive() -> None:
    first, second = b"1" * BODY_BYTES_MIN, b"2" * BODY_BYTES_MIN
    async with serving(echo) as client:
        assert (await client.call("m", (first, second), {}))[1] == (first, second)


async def test_many_calls_at_once_do_not_mix() -> None:
    async with serving(echo) as client:
        sent = [os.urandom(1000 * number) for number in range(50)]
        assert await asyncio.gather(*(client.call("first", (data,), {}) for data in sent)) == sent


async def test_an_error_is_raised_where_the_call_was_made() -> None:
    async def serve(*_: object) -> Any:
        raise ObjectNotFound("a/b")

    async with serving(serve) as client:
        with pytest.raises(ObjectNotFound) as raised:
            await client.call("get", ("a/b",), {})
        assert raised.value.key == "a/b"
        with pytest.raises(ObjectNotFound):
            await client.call("get", ("a/b",), {})


async def test_an_error_that_cannot_be_sent_does_not_leave_the_caller_waiting() -> None:
    async def serve(*_: object) -> Any:
        error = ValueError("x")
        error.lock = threading.Lock()  # type: ignore[attr-defined]
        raise error

    async with serving(serve) as client:
        with pytest.raises(RuntimeError, match="ValueError"):
            await client.call("get", (), {})


async def test_what_its_caller_no_longer_wants_is_cancelled() -> None:
    started, cancelled = asyncio.Event(), asyncio.Event()

    async def serve(*_: object) -> Any:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    async with serving(serve) as client, asyncio.timeout(WAIT_S):
        call = asyncio.create_task(client.call("get", (), {}))
        await started.wait()
        call.cancel()
        await cancelled.wait()


async def test_a_server_that_ends_cuts_the_calls_under_way_and_is_missed_by_the_next() -> None:
    started = asyncio.Event()

    async def serve(*_: object) -> Any:
        started.set()
        await asyncio.Event().wait()

    async with serving(serve) as client:
        call = asyncio.create_task(client.call("get", (), {}))
        await started.wait()

    with pytest.raises(ChannelClosedError):
        await call
    with pytest.raises(ChannelMissingError):
        await client.call("get", (), {})


async def test_a_kept_connection_to_an_ended_server_is_not_used_again() -> None:
    async with serving(echo) as client:
        await client.call("first", (1,), {})

    with pytest.raises(ChannelMissingError):
        await client.call("first", (2,), {})


async def test_requests_wait_for_room_and_one_that_is_larger_than_all_of_it_comes_alone() -> None:
    sizes: list[int] = []
    now = most = 0

    async def serve(_: str, arguments: Sequence[Any], __: Mapping[str, Any]) -> Any:
        nonlocal now, most
        now += len(arguments[0])
        sizes.append(len(arguments[0]))
        most = max(most, now)
        await asyncio.sleep(0.01)
        now -= len(arguments[0])

    async with serving(serve, bytes_max=250_000) as client:
        await asyncio.gather(*(client.call("put", (bytes(100_000),), {}) for _ in range(8)))
        assert most == 200_000
        await client.call("put", (bytes(400_000),), {})
    assert sizes[-1] == 400_000


async def test_a_small_request_waits_for_no_large_one() -> None:
    started, released = asyncio.Event(), asyncio.Event()

    async def serve(_: str, arguments: Sequence[Any], __: Mapping[str, Any]) -> Any:
        if arguments:
            started.set()
            await released.wait()

    async with serving(serve, bytes_max=100_000) as client, asyncio.timeout(WAIT_S):
        large = [asyncio.create_task(client.call("put", (bytes(90_000),), {})) for _ in range(2)]
        await started.wait()
        await client.call("head", (), {})
        assert not any(call.done() for call in large)
        released.set()
        await asyncio.gather(*large)


async def test_a_server_that_can_open_no_more_files_goes_on_when_it_can(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    loop = asyncio.get_running_loop()
    accept, failures = loop.sock_accept, iter([OSError(errno.EMFILE, "too many"), None])

    async def full_once(listener: socket.socket) -> Any:
        accepted = await accept(listener)
        error = next(failures, None)
        if error is not None:
            accepted[0].close()
            raise error
        return accepted

    monkeypatch.setattr(loop, "sock_accept", full_once)
    async with serving(echo) as client, asyncio.timeout(WAIT_S):
        with pytest.raises(ChannelClosedError):
            await client.call("first", (1,), {})
        assert await client.call("first", (2,), {}) == 2
    assert "no connection can be taken" in caplog.messages


async def test_a_connection_that_talks_nonsense_is_cut_and_logged_and_others_are_served(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with serving(echo) as client, asyncio.timeout(WAIT_S):
        reader, writer = await asyncio.open_unix_connection(client.path)
        writer.write(b"-" + HEAD.pack(4, 0, False) + b"junk")
        assert await reader.read() == b""
        writer.close()
        await writer.wait_closed()
        assert await client.call("first", (1,), {}) == 1
    assert "a connection of the channel has failed" in caplog.messages


async def test_a_client_works_from_several_loops_and_threads() -> None:
    async with serving(echo) as client:
        assert await client.call("first", (1,), {}) == 1
        assert await asyncio.to_thread(lambda: asyncio.run(client.call("first", (2,), {}))) == 2
        assert await client.call("first", (3,), {}) == 3


def socket_of_a_killed_server(folder: Path) -> Path:
    code = (
        "import asyncio,os,sys,tempfile; tempfile.gettempdir = lambda: sys.argv[1]\n"
        "from storage.node_channel import ChannelServer\n"
        "print(asyncio.run(ChannelServer(None, bytes_max=1).start()), flush=True); os._exit(0)"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    return Path(ended.stdout.strip())


async def test_the_sockets_of_killed_servers_are_removed_and_live_ones_stay(own_temporary_folder: Path) -> None:
    await asyncio.to_thread(socket_of_a_killed_server, own_temporary_folder)
    assert len(sockets_in(own_temporary_folder)) == 1

    async with serving(echo) as first:
        assert len(sockets_in(own_temporary_folder)) == 1
        async with serving(echo):
            assert await first.call("first", (1,), {}) == 1


def sockets_in(folder: Path) -> list[Path]:
    return list(folder.glob("*/*.socket"))


async def test_a_folder_that_others_can_enter_gets_no_socket(own_temporary_folder: Path) -> None:
    (own_temporary_folder / f"raylora-{os.getuid()}").mkdir(mode=0o755)

    assert await ChannelServer(echo, bytes_max=1).start() is None


def test_a_forked_process_has_connections_of_its_own(own_temporary_folder: Path) -> None:
    code = """
import asyncio, os, sys, tempfile, threading
tempfile.gettempdir = lambda: sys.argv[1]
from storage.node_channel import ChannelClient, ChannelServer
async def echo(method, arguments, keywords):
    return arguments[0]
async def serve(ready):
    ready.append(await ChannelServer(echo, bytes_max=1 << 20).start())
    await asyncio.Event().wait()
ready = []
if os.fork() == 0:
    asyncio.run(serve(ready))
import time, pathlib
while not (found := list(pathlib.Path(sys.argv[1]).glob("*/*.socket"))):
    time.sleep(0.01)
client = ChannelClient(found[0])
call = lambda data: asyncio.run(client.call("m", (data,), {}))
assert call(b"0" * 100_000) == b"0" * 100_000
child = os.fork()
mark = b"c" if child == 0 else b"p"
for number in range(200):
    data = mark * (20_000 + number)
    assert call(data) == data
if child == 0:
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
print("whole", flush=True)
os.killpg(0, 9)
"""
    running = subprocess.Popen(
        [sys.executable, "-c", code, str(own_temporary_folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, start_new_session=True,
    )  # fmt: skip
    try:
        out, err = running.communicate(timeout=WAIT_S * 3)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGKILL)
        running.communicate()
    assert "whole" in out, err


async def test_the_socket_lies_where_nobody_else_can_enter() -> None:
    server = ChannelServer(echo, bytes_max=1)
    path = await server.start()
    assert path is not None
    try:
        assert path.parent.stat().st_mode & 0o777 == 0o700
    finally:
        await server.aclose()


def test_the_errors_survive_pickle() -> None:
    assert pickle.loads(pickle.dumps(ChannelMissingError(2))).errno == 2  # noqa: S301


async def test_work_whose_caller_left_is_cancelled_once_and_cleans_up() -> None:
    begun, cleaned = asyncio.Event(), asyncio.Event()

    async def serve(*_: object) -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            for _ in range(20):
                await asyncio.sleep(0)
            cleaned.set()

    async with serving(serve) as client:
        call = asyncio.create_task(client.call("m", (), {}))
        await begun.wait()
        call.cancel()
        async with asyncio.timeout(WAIT_S):
            await cleaned.wait()


async def test_a_burst_that_fills_the_backlog_is_answered_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_channel, "BACKLOG", 1)
    async with serving(echo) as client:
        assert await asyncio.gather(*(client.call("first", (n,), {}) for n in range(200))) == list(range(200))


async def test_a_client_that_may_open_no_more_files_does_not_take_the_server_for_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EMFILE, "too many open files")

    async with serving(echo) as client:
        monkeypatch.setattr(node_channel.Connection, "offer_memory", refuse)
        with pytest.raises(ChannelClosedError):
            await client.call("first", (1,), {})


async def test_where_no_socket_can_be_made_there_is_no_channel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / ("long" * 30)
    folder.mkdir()
    monkeypatch.setattr(node_channel.tempfile, "gettempdir", lambda: str(folder))

    assert await ChannelServer(echo, bytes_max=1).start() is None
