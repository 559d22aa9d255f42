"""Calls between the processes of one node over a Unix socket, for what an actor call takes too long for.

The wire, in both directions: two lengths (4 and 8 bytes, big-endian), whether the body lies in shared memory (1 byte),
a pickled message, and the body, raw bytes that are not pickled. The caller's first byte brings the shared memory, an
anonymous file of `SHARED_BYTES`, where the system has such files. A request's message is (method, arguments, keywords);
an answer's is (whether it succeeded, the result or the exception). One call at a time on a connection; to cancel it,
the caller closes the connection. Pickle is safe there: only this user can enter the folder that the socket lies in.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import mmap
import os
import pickle
import random
import secrets
import socket
import struct
import tempfile
import weakref
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage.byte_budget import ByteBudget
from storage.own_sockets import is_own, listen_at, remove_abandoned

logger = logging.getLogger(__name__)

Serve = Callable[[str, Sequence[Any], Mapping[str, Any]], Awaitable[Any]]

HEAD = struct.Struct(">IQ?")
BODY_BYTES_MIN = 16 * 1024
FIRST_READ_BYTES = 64 * 1024
SHARED_BYTES = 2 * 1024 * 1024
KEPT_BYTES_MAX = 2 * 1024 * 1024
IDLE_MAX = 64
BACKLOG = 1024
CONNECT_WITHIN_S, CONNECT_PAUSE_S = 10.0, 0.05
MISSING = frozenset({errno.ENOENT, errno.ECONNREFUSED, errno.EACCES, errno.EPERM})
ACCEPT_PAUSE_S = 0.1
SUFFIX = ".socket"


class ChannelClosedError(Exception):
    """The other side is gone. Nobody knows whether the call had its effect."""


class ChannelMissingError(Exception):
    """There is no server to connect to. `errno` says why."""

    def __init__(self, errno: int | None) -> None:
        super().__init__(errno)
        self.errno = errno


@dataclass(frozen=True)
class _Body:
    """Stands in a message for the bytes beside it."""


class ChannelServer:
    """Answers calls with what `serve` returns or raises. Belongs to one event loop.

    The large requests that are held at one time have `bytes_max` bytes together, and one that is larger comes alone;
    small ones wait for none of them.
    """

    def __init__(self, serve: Serve, *, bytes_max: int) -> None:
        self._serve = serve
        self._held = ByteBudget(bytes_max)
        self._tasks: set[asyncio.Task[None]] = set()
        self._listener: socket.socket | None = None
        self.path: Path | None = None

    @property
    def request_bytes(self) -> int:
        """Of the large requests that are held now."""
        return self._held.held_bytes

    @property
    def connections(self) -> int:
        return max(0, len(self._tasks) - 1)

    async def start(self) -> Path | None:
        """Where it listens; None where the folder for it is not this user's alone, or no socket can be made there."""
        try:
            folder = _own_folder()
            if folder is None:
                return None
            remove_abandoned(folder, SUFFIX)
            path = folder / (secrets.token_hex(8) + SUFFIX)
            listener = listen_at(path, BACKLOG)
        except OSError as error:
            # As where the temporary folder's path is longer than an address may be.
            logger.warning("the socket of the storage actor cannot be made: %s", error.strerror or error)
            return None
        self._listener, self.path = listener, path
        self._keep(asyncio.create_task(self._accept(listener)))
        return path

    async def aclose(self) -> None:
        """Cut all connections."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._listener is not None:
            self._listener.close()
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("a connection of the channel has failed", exc_info=error, extra={"path": str(self.path)})

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                accepted, _ = await loop.sock_accept(listener)
            except OSError as error:
                # As where no more files may be opened: what waits is taken when others are closed.
                logger.warning("no connection can be taken", extra={"path": str(self.path), "errno": error.errno})
                await asyncio.sleep(ACCEPT_PAUSE_S)
                continue
            accepted.setblocking(False)
            self._keep(asyncio.create_task(self._converse(_Connection(accepted))))

    async def _converse(self, connection: _Connection) -> None:
        with contextlib.closing(connection), contextlib.suppress(ChannelClosedError, ConnectionError):
            await connection.accept_memory()
            while True:
                await self._answer_one(connection)

    async def _answer_one(self, connection: _Connection) -> None:
        size_bytes = await connection.head()
        async with self._held.hold(size_bytes) if size_bytes > BODY_BYTES_MIN else contextlib.nullcontext():
            method, arguments, keywords = await connection.message()
            serving = asyncio.ensure_future(self._outcome(method, arguments, keywords))
            with _watched(connection.socket, serving):
                try:
                    outcome = await serving
                except asyncio.CancelledError:
                    if connection.is_gone():
                        raise ChannelClosedError from None
                    serving.cancel()
                    await asyncio.wait({serving})
                    raise
        await connection.send(outcome)

    async def _outcome(self, method: str, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> tuple[bool, Any]:
        try:
            return True, await self._serve(method, arguments, keywords)
        except Exception as error:  # noqa: BLE001 - it is raised where the call was made
            return False, error


class ChannelClient:
    """Calls the server at `path`. From any event loop and thread; the connections that nobody uses are kept."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._idle: deque[_Connection] = deque()
        self._process = os.getpid()
        weakref.finalize(self, _close_all, self._idle)

    async def call(self, method: str, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> Any:
        """What the server returns, or the exception that it raises.

        Raises ChannelClosedError when the server ends meanwhile, ChannelMissingError when it is not there at all.
        """
        connection = await self._connection()
        try:
            await connection.send((method, arguments, keywords))
            await connection.head()
            succeeded, result = await connection.message()
        except ConnectionError as error:
            connection.close()
            raise ChannelClosedError from error
        except BaseException:
            connection.close()
            raise
        self._give_back(connection)
        if succeeded:
            return result
        raise result

    async def _connection(self) -> _Connection:
        if self._process != os.getpid():
            # A fork shares its parent's connections, on which only one of them may speak.
            _close_all(self._idle)
            self._process = os.getpid()
        while self._idle:
            connection = self._idle.pop()
            if not connection.is_gone():
                return connection
            connection.close()
        end = _socket()
        try:
            await self._connect(end)
            connection = _Connection(end)
            connection.offer_memory()
        except OSError as error:
            end.close()
            if error.errno in MISSING:
                raise ChannelMissingError(error.errno) from error
            raise ChannelClosedError from error
        except BaseException:
            end.close()
            raise
        return connection

    async def _connect(self, end: socket.socket) -> None:
        """A connection to a Unix socket is made at once, or refused because too many others wait there: asyncio would
        take that one for made."""
        async with asyncio.timeout(CONNECT_WITHIN_S):
            while True:
                try:
                    return end.connect(str(self.path))
                except BlockingIOError:
                    await asyncio.sleep(random.uniform(0, CONNECT_PAUSE_S))

    def _give_back(self, connection: _Connection) -> None:
        if len(self._idle) < IDLE_MAX:
            self._idle.append(connection)
        else:
            connection.close()


class _Connection:
    """One end. Keeps the memory that it receives into, because new memory costs more than the copy out of it."""

    def __init__(self, end: socket.socket) -> None:
        self.socket = end
        self._memory = memoryview(bytearray(FIRST_READ_BYTES))
        self._read = 0
        self._message_bytes = self._body_bytes = 0
        self._is_shared = False
        self._shared: mmap.mmap | None = None

    def close(self) -> None:
        self.socket.close()
        if self._shared is not None:
            self._shared.close()

    def offer_memory(self) -> None:
        """The caller's part, once, before anything is sent."""
        if not hasattr(os, "memfd_create"):
            self.socket.send(b"-")
            return
        file = os.memfd_create("raylora-channel")
        try:
            os.ftruncate(file, SHARED_BYTES)
            self._shared = mmap.mmap(file, SHARED_BYTES)
            socket.send_fds(self.socket, [b"+"], [file])
        finally:
            os.close(file)

    async def accept_memory(self) -> None:
        """The server's part. Raises ChannelClosedError."""
        await _readable(self.socket)
        first, files, *_ = socket.recv_fds(self.socket, 1, 1)
        if not first:
            raise ChannelClosedError
        for file in files:
            try:
                self._shared = mmap.mmap(file, SHARED_BYTES)
            finally:
                os.close(file)

    def is_gone(self) -> bool:
        """Whether the other side has closed, or sent what nobody asked for."""
        try:
            self.socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True
        return True

    async def send(self, message: tuple[Any, ...]) -> None:
        rest, body = _parted(message)
        pickled = _pickled(rest)
        loop = asyncio.get_running_loop()
        is_shared = self._shared is not None and 0 < len(body) <= SHARED_BYTES
        if self._shared is not None and is_shared:
            self._shared[: len(body)] = body
        await loop.sock_sendall(self.socket, HEAD.pack(len(pickled), len(body), is_shared) + pickled)
        if body and not is_shared:
            await loop.sock_sendall(self.socket, body)

    async def head(self) -> int:
        """How many bytes of a message are to come. Raises ChannelClosedError."""
        self._read = 0
        await self._fill(HEAD.size)
        self._message_bytes, self._body_bytes, self._is_shared = HEAD.unpack(self._memory[: HEAD.size])
        return self._message_bytes + self._body_bytes

    async def message(self) -> Any:
        """After its head. Raises ChannelClosedError."""
        message_end = HEAD.size + self._message_bytes
        end = message_end + (0 if self._is_shared else self._body_bytes)
        if end > len(self._memory):
            larger = memoryview(bytearray(end))
            larger[: self._read] = self._memory[: self._read]
            self._memory = larger
        await self._fill(end)
        message = pickle.loads(self._memory[HEAD.size : message_end])  # noqa: S301
        whole = _joined(message, self._body(message_end, end))
        if len(self._memory) > KEPT_BYTES_MAX:
            self._memory = memoryview(bytearray(FIRST_READ_BYTES))
        return whole

    def _body(self, start: int, end: int) -> bytes:
        if self._is_shared and self._shared is not None:
            return self._shared[: self._body_bytes]
        return bytes(self._memory[start:end])

    async def _fill(self, end: int) -> None:
        loop = asyncio.get_running_loop()
        while self._read < end:
            received = await loop.sock_recv_into(self.socket, self._memory[self._read : max(end, FIRST_READ_BYTES)])
            if received == 0:
                raise ChannelClosedError
            self._read += received


def _pickled(message: tuple[Any, ...]) -> bytes:
    try:
        return pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    except (pickle.PicklingError, TypeError, AttributeError):
        if not isinstance(message[-1], BaseException):
            raise
        logger.exception("an exception cannot be sent", extra={"kind": type(message[-1]).__name__})
        return pickle.dumps((False, RuntimeError(type(message[-1]).__name__)))


def _parted(message: tuple[Any, ...]) -> tuple[tuple[Any, ...], bytes | memoryview]:
    """The message without its first large bytes, and those. Memory is sent as bytes."""
    body: bytes | memoryview = b""

    def part(value: Any) -> Any:
        nonlocal body
        if not isinstance(value, bytes | memoryview):
            return value
        if not body and len(value) >= BODY_BYTES_MIN:
            body = value
            return _Body()
        return bytes(value)

    parted = tuple(tuple(part(inner) for inner in item) if type(item) is tuple else part(item) for item in message)
    return parted, body


def _joined(message: tuple[Any, ...], body: bytes) -> tuple[Any, ...]:
    def join(value: Any) -> Any:
        return body if isinstance(value, _Body) else value

    return tuple(tuple(join(inner) for inner in item) if type(item) is tuple else join(item) for item in message)


@contextlib.contextmanager
def _watched(connection: socket.socket, serving: asyncio.Future[Any]) -> Iterator[None]:
    """Cancels the work when the caller goes away; it sends nothing until it has its answer."""
    loop = asyncio.get_running_loop()

    def leave() -> None:
        # A closed socket stays readable, and work that cleans up must not be cancelled again and again.
        loop.remove_reader(connection)
        serving.cancel()

    loop.add_reader(connection, leave)
    try:
        yield
    finally:
        loop.remove_reader(connection)


async def _readable(end: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    came = loop.create_future()

    def note() -> None:
        if not came.done():
            came.set_result(None)

    loop.add_reader(end, note)
    try:
        await came
    finally:
        loop.remove_reader(end)


def _socket() -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    made.setblocking(False)
    return made


def _own_folder() -> Path | None:
    folder = Path(tempfile.gettempdir(), f"raylora-{os.getuid()}")
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    if is_own(folder):
        return folder
    logger.warning("the folder for sockets is open to other users", extra={"folder": str(folder)})
    return None


def _close_all(connections: deque[_Connection]) -> None:
    while connections:
        connections.pop().close()
