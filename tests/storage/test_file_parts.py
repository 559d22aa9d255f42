"""Parts of files, piece by piece."""

from __future__ import annotations

import asyncio
import io
import random
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storage import file_parts
from storage.digests import md5_of
from storage.file_parts import AT_ONCE_BYTES, PIECE_BYTES, FilePart, PartWriter
from storage.resilience import TransientFaultError
from storage.settings import MIB

FILE = random.Random(1).randbytes(3 * MIB + 17)
PLACES = st.tuples(st.integers(0, len(FILE)), st.integers(0, len(FILE))).map(sorted)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "file"
    file.write_bytes(FILE)
    return file


def content(path: Path) -> bytes:
    return path.read_bytes()


async def sent(part: FilePart) -> bytes:
    return b"".join([piece async for piece in part])


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(PLACES, st.integers(1, 2 * AT_ONCE_BYTES))
def test_what_is_sent_and_what_is_read_is_the_part_and_has_its_md5(path: Path, place: list[int], step: int) -> None:
    first, end = place
    wanted = FILE[first:end]
    part = FilePart(path, first, end - first)
    assert len(part) == end - first
    assert asyncio.run(sent(part)) == wanted
    assert part.md5 == md5_of(wanted)
    # As botocore does for a signature, before it is sent.
    part.seek(0)
    read = [*iter(lambda: part.read(step), b"")]
    assert (b"".join(read), part.tell()) == (wanted, len(wanted))
    assert part.md5 == md5_of(wanted)
    assert asyncio.run(sent(part)) == wanted
    assert part.md5 == md5_of(wanted)
    assert part.problem is None


def test_it_goes_back_to_its_beginning_only(path: Path) -> None:
    part = FilePart(path, 5, 10)
    part.read(3)
    assert part.read() == FILE[8:15]
    for offset, whence in ((1, io.SEEK_SET), (0, io.SEEK_END)):
        with pytest.raises(io.UnsupportedOperation):
            part.seek(offset, whence)


async def test_what_is_wrong_with_the_file_is_told(path: Path) -> None:
    part = FilePart(path, len(FILE) - 10, 11)
    with pytest.raises(EOFError):
        await sent(part)
    assert isinstance(part.problem, EOFError)
    part = FilePart(path.with_name("gone"), 0, 11)
    with pytest.raises(FileNotFoundError):
        await sent(part)
    assert isinstance(part.problem, FileNotFoundError)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(PLACES, st.integers(1, 2 * PIECE_BYTES))
def test_what_is_written_lies_in_its_place(tmp_path: Path, place: list[int], step: int) -> None:
    first, end = place
    target = tmp_path / "target"
    target.write_bytes(bytes(len(FILE)))

    async def write() -> int:
        writer = PartWriter(target, first)
        for start in range(first, end, step):
            await writer.write(FILE[start : min(start + step, end)], at_most_bytes=end - first)
        await writer.flush()
        return writer.written_bytes

    assert asyncio.run(write()) == end - first
    assert target.read_bytes() == bytes(first) + FILE[first:end] + bytes(len(FILE) - end)


async def test_no_more_is_written_than_the_part(path: Path) -> None:
    writer = PartWriter(path, 0)
    await writer.write(b"1234", at_most_bytes=5)
    with pytest.raises(TransientFaultError):
        await writer.write(b"56", at_most_bytes=5)
    assert content(path) == FILE


async def test_a_cancelled_write_has_ended_before_the_next_attempt(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, may_end, write = threading.Event(), threading.Event(), file_parts._write

    def slow(*arguments: Path | int | Sequence[bytes]) -> int:
        begun.set()
        may_end.wait()
        return write(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(file_parts, "_write", slow)
    writer = PartWriter(path, 0)
    await writer.write(b"old", at_most_bytes=3)
    flushing = asyncio.create_task(writer.flush())
    await asyncio.to_thread(begun.wait)
    flushing.cancel()
    await asyncio.sleep(0.01)
    assert not flushing.done()
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await flushing
    assert content(path)[:3] == b"old"
