"""One end of a connection of `storage.node_channel`, and what a message looks like on it.

The wire, in both directions: two lengths (4 and 8 bytes, big-endian), whether the body lies in shared memory (1 byte),
a pickled message, and the body, raw bytes that are not pickled. The caller's first byte brings the shared memory, an
anonymous file of `SHARED_BYTES`, where the system has such files. A request's message is (method, arguments, keywords);
an answer's is (whether it succeeded, the result or the exception). Pickle is safe there: only this user can enter the
folder that the socket lies in.
"""

from __future__ import annotations

import asyncio
import logging
import mmap
import os
import pickle
import socket
import struct
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger(__name__)

HEAD = struct.Struct(">IQ?")
BODY_BYTES_MIN = 16 * 1024
FIRST_READ_BYTES = 64 * 1024
SHARED_BYTES = 2 * 1024 * 1024
KEPT_BYTES_MAX = 2 * 1024 * 1024


class ChannelClosedError(Exception):
    """The other side is gone. Nobody knows whether the call had its effect."""


@dataclass(frozen=True)
class _Body:
    """Stands in a message for the bytes beside it."""


class Connection:
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
