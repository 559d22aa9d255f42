"""Calls between the processes of one node over a Unix socket, for what an actor call takes too long for.

One call at a time on a connection (`storage.channel_connection`); to cancel it, the caller closes the connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import random
import secrets
import socket
import tempfile
import weakref
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from storage.byte_budget import ByteBudget
from storage.channel_connection import BODY_BYTES_MIN, ChannelClosedError, Connection
from storage.own_sockets import is_own, listen_at, remove_abandoned

logger = logging.getLogger(__name__)

Serve = Callable[[str, Sequence[Any], Mapping[str, Any]], Awaitable[Any]]

IDLE_MAX = 64
BACKLOG = 1024
CONNECT_WITHIN_S, CONNECT_PAUSE_S = 10.0, 0.05
MISSING = frozenset({errno.ENOENT, errno.ECONNREFUSED, errno.EACCES, errno.EPERM})
ACCEPT_PAUSE_S = 0.1
SUFFIX = ".socket"


class ChannelMissingError(Exception):
    """There is no server to connect to. `errno` says why."""

    def __init__(self, errno: int | None) -> None:
        super().__init__(errno)
        self.errno = errno


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
            self._keep(asyncio.create_task(self._converse(Connection(accepted))))

    async def _converse(self, connection: Connection) -> None:
        with contextlib.closing(connection), contextlib.suppress(ChannelClosedError, ConnectionError):
            await connection.accept_memory()
            while True:
                await self._answer_one(connection)

    async def _answer_one(self, connection: Connection) -> None:
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
        self._idle: deque[Connection] = deque()
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

    async def _connection(self) -> Connection:
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
            connection = Connection(end)
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

    def _give_back(self, connection: Connection) -> None:
        if len(self._idle) < IDLE_MAX:
            self._idle.append(connection)
        else:
            connection.close()


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


def _close_all(connections: deque[Connection]) -> None:
    while connections:
        connections.pop().close()
