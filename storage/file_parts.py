"""Parts of files on their way to S3 and from there, piece by piece: a part's bytes are never in memory as a whole."""

from __future__ import annotations

import asyncio
import hashlib
import io
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from storage.resilience import TransientFaultError
from storage.settings import MIB

# Small enough for an allocator to use their memory again, which costs less than new memory from the system.
PIECE_BYTES = 256 * 1024
# Going to a thread and back for each piece would cost as much as its hash.
AT_ONCE_BYTES = MIB


class FilePart:
    """A part of a file as the body of a request: `size_bytes` from `first` on.

    aiohttp iterates over it, while a thread reads and hashes what comes next. botocore reads it as a file where it
    hashes a body for its signature or checksum, and goes back to its beginning.
    """

    def __init__(self, path: Path, first: int, size_bytes: int) -> None:
        self._path = path
        self._first = first
        self._size_bytes = size_bytes
        self._position = 0
        self._md5 = hashlib.md5(usedforsecurity=False)
        self.problem: OSError | EOFError | None = None
        """What was wrong with the file; EOFError where it ended within the part."""

    def __len__(self) -> int:
        return self._size_bytes

    @property
    def md5(self) -> str:
        """Of what was read since its beginning, in hex: of the part once it was sent."""
        return self._md5.hexdigest()

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """To the beginning. Raises io.UnsupportedOperation for any other place."""
        if offset != 0 or whence != io.SEEK_SET:
            raise io.UnsupportedOperation
        self._position = 0
        self._md5 = hashlib.md5(usedforsecurity=False)
        return 0

    def read(self, size: int | None = -1) -> bytes:
        left = self._size_bytes - self._position
        pieces = self._pieces(self._position, left if size is None or size < 0 else min(size, left))
        self._position += sum(map(len, pieces))
        return b"".join(pieces)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Raises `problem`. A body that just ended would leave the server waiting for the rest."""
        self.seek(0)
        ahead = self._ahead()
        while self._position < self._size_bytes:
            pieces = await ahead
            self._position += sum(map(len, pieces))
            if self.problem is not None:
                raise self.problem
            ahead = self._ahead()
            for piece in pieces:
                yield piece

    def _ahead(self) -> asyncio.Future[Sequence[bytes]]:
        wanted = min(AT_ONCE_BYTES, self._size_bytes - self._position)
        return asyncio.ensure_future(asyncio.to_thread(self._pieces, self._position, wanted))

    def _pieces(self, start: int, wanted: int) -> Sequence[bytes]:
        """Opens the file by its name: a thread cannot be cancelled, and a descriptor that is closed under it may be
        another file's by then."""
        pieces: list[bytes] = []
        try:
            with self._path.open("rb", buffering=0) as file:
                file.seek(self._first + start)
                while wanted > 0:
                    piece = file.read(min(wanted, PIECE_BYTES))
                    if not piece:
                        self.problem = EOFError("the file ends within the part")
                        break
                    self._md5.update(piece)
                    pieces.append(piece)
                    wanted -= len(piece)
        except OSError as error:
            self.problem = error
            raise
        return pieces


class PartWriter:
    """Writes what comes of a part into a file that is there, from `first` on. `written_bytes` counts."""

    def __init__(self, path: Path, first: int) -> None:
        self._path = path
        self._first = first
        self._pieces: list[bytes] = []
        self._waiting_bytes = 0
        self.written_bytes = 0

    async def write(self, piece: bytes, *, at_most_bytes: int) -> None:
        """Raises TransientFaultError where this makes more than `at_most_bytes` of the part: the rest of the file is
        others'."""
        if self.written_bytes + self._waiting_bytes + len(piece) > at_most_bytes:
            raise TransientFaultError("too_long")
        self._pieces.append(piece)
        self._waiting_bytes += len(piece)
        if self._waiting_bytes >= AT_ONCE_BYTES:
            await self.flush()

    async def flush(self) -> None:
        """Cancelled, it waits until the thread has ended: what it still wrote would replace a later attempt's bytes."""
        pieces, start = self._pieces, self._first + self.written_bytes
        self._pieces, self._waiting_bytes = [], 0
        writing = asyncio.ensure_future(asyncio.to_thread(_write, self._path, start, pieces))
        try:
            self.written_bytes += await asyncio.shield(writing)
        except asyncio.CancelledError:
            await asyncio.wait({writing})
            raise


def _write(path: Path, start: int, pieces: Sequence[bytes]) -> int:
    with path.open("r+b", buffering=0) as file:
        file.seek(start)
        for piece in pieces:
            rest = memoryview(piece)
            while rest:
                rest = rest[file.write(rest) :]
        return file.tell() - start
