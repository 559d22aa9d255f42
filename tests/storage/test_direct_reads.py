"""Reads past the jobs actor: as true as its own, and none where they could not be."""

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from storage.direct_reads import READS, DirectReads, NotReadableError
from storage.errors import JobNotFound, JobsUnavailable, RecordsFailed, RecordsUnavailable
from storage.job_state import JobKind, JobState
from storage.jobs import RESTORED_FLAG
from storage.jobs_testing import JobsWorld
from storage.records import Records
from storage.row_lookups import RowLookups
from tests.storage.postgres import database


@pytest.fixture(params=["sqlite", "postgres"])
def world(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[JobsWorld]:
    with database(request.param) as url:
        world = JobsWorld(tmp_path, url=url)
        restored(world)
        yield world
        world.close()


def restored(world: JobsWorld) -> None:
    with world.records.write("test") as tx:
        tx.set_flag(RESTORED_FLAG)


async def opened(reads: DirectReads) -> None:
    """The first call only has the database looked for."""
    with pytest.raises(NotReadableError):
        await reads.call("counts", (), {})
    await asyncio.wait({reads._opening})  # type: ignore[arg-type]


@asynccontextmanager
async def reading(world: JobsWorld) -> AsyncIterator[DirectReads]:
    async def find() -> str:
        return world.url

    reads = DirectReads(find)
    await opened(reads)
    yield reads
    reads.close()


def has_to_wait(reads: DirectReads, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where another process of SQLite's recovers its log: what is asked on the event loop is refused."""

    def refuse(*_: object) -> None:
        raise RecordsUnavailable("look_up")

    monkeypatch.setattr(RowLookups, "read", refuse)


async def test_what_was_committed_is_read_at_once(world: JobsWorld) -> None:
    async with reading(world) as reads:
        for _ in range(20):
            record = world.create(tenant="a")
            assert await reads.call("get", (record.id,), {"tenant": "a"}) == record
            cancelled = world.jobs.request_cancel(record.id, tenant="a")
            assert await reads.call("get", (record.id,), {"tenant": "a"}) == cancelled
        assert await reads.call("list", ("a",), {"limit": 100}) == world.jobs.list("a", limit=100)


async def test_a_foreign_record_is_not_found_here_either(world: JobsWorld) -> None:
    record = world.create(tenant="a")
    async with reading(world) as reads:
        with pytest.raises(JobNotFound):
            await reads.call("get", (record.id,), {"tenant": "b"})


async def test_reads_at_once_each_get_their_own_answer(world: JobsWorld) -> None:
    records = [world.create(tenant="a") for _ in range(5)]
    async with reading(world) as reads:
        asked = [(record.id, tenant) for record in records for tenant in ("a", "b")] * 20
        calls = (reads.call("get", (job_id,), {"tenant": tenant}) for job_id, tenant in asked)
        found = await asyncio.gather(*calls, return_exceptions=True)
        for (job_id, tenant), answer in zip(asked, found, strict=True):
            if tenant == "a":
                assert answer.id == job_id  # type: ignore[union-attr]
            else:
                assert isinstance(answer, JobNotFound)


async def test_rows_are_read_without_a_thread_and_in_one_where_they_have_to_be_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = JobsWorld(tmp_path)
    restored(world)
    record = world.create(tenant="a")
    threads: list[object] = []
    in_thread = asyncio.to_thread

    async def noted(work: Any, *args: Any) -> Any:
        threads.append(work)
        return await in_thread(work, *args)

    async with reading(world) as reads:
        monkeypatch.setattr(asyncio, "to_thread", noted)
        assert await reads.call("get", (record.id,), {"tenant": "a"}) == record
        assert threads == []
        has_to_wait(reads, monkeypatch)
        assert await reads.call("get", (record.id,), {"tenant": "a"}) == record
        assert len(threads) == 1
    world.close()


async def test_a_lookup_waits_for_no_lock_and_the_next_one_is_answered(tmp_path: Path) -> None:
    world = JobsWorld(tmp_path)
    record = world.create(tenant="a")
    file = world.records.file
    assert file is not None
    reads = RowLookups(file)
    world.close()
    # Alone with the file, a connection can keep it for itself.
    other = sqlite3.connect(file, isolation_level=None)
    other.execute("PRAGMA locking_mode=EXCLUSIVE").close()
    other.execute("BEGIN IMMEDIATE").close()
    with pytest.raises(RecordsUnavailable), reads.read("test") as tx:
        tx.get(record.id)
    other.close()
    with reads.read("test") as tx:
        assert tx.get(record.id) == record
    reads.close()


async def test_a_read_whose_caller_has_gone_takes_no_other_with_it(
    world: JobsWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = world.create(tenant="a")
    async with reading(world) as reads:
        has_to_wait(reads, monkeypatch)
        calls = [asyncio.create_task(reads.call("get", (record.id,), {"tenant": "a"})) for _ in range(10)]
        await asyncio.sleep(0)
        calls[0].cancel()
        calls[5].cancel()
        found = await asyncio.gather(*calls, return_exceptions=True)
        assert [isinstance(answer, asyncio.CancelledError) for answer in found] == [n in (0, 5) for n in range(10)]


async def test_where_the_database_fails_all_that_read_together_ask_the_actor(
    world: JobsWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RecordsUnavailable("read")

    async with reading(world) as reads:
        has_to_wait(reads, monkeypatch)
        monkeypatch.setattr(reads._records, "read", fail)
        found = await asyncio.gather(*(reads.call("get", ("x",), {}) for _ in range(3)), return_exceptions=True)
        assert [type(answer) for answer in found] == [NotReadableError] * 3


async def test_nothing_is_read_before_the_records_were_restored(tmp_path: Path) -> None:
    world = JobsWorld(tmp_path)

    async def find() -> str:
        return world.url

    reads = DirectReads(find)
    assert not await asyncio.to_thread(reads._opened, world.url)
    restored(world)
    assert await asyncio.to_thread(reads._opened, world.url)
    reads.close()
    world.close()


async def test_a_database_that_was_lost_and_made_anew_is_opened_again(tmp_path: Path) -> None:
    first = JobsWorld(tmp_path / "a")
    restored(first)
    async with reading(first) as reads:
        first.create()
        assert (await reads.call("counts", (), {}))[JobState.QUEUED] == 1
        first.close()
        for path in (tmp_path / "a" / "records").iterdir():
            path.unlink()
        second = JobsWorld(tmp_path / "a")
        restored(second)
        await opened(reads)
        assert (await reads.call("counts", (), {}))[JobState.QUEUED] == 0
        second.close()


@pytest.mark.parametrize("found", [None, JobsUnavailable("url_on")], ids=["another node's", "no actor"])
async def test_without_a_database_the_actor_is_asked(found: JobsUnavailable | None) -> None:
    async def find() -> str | None:
        if found is not None:
            raise found
        return None

    reads = DirectReads(find)
    for _ in range(3):
        with pytest.raises(NotReadableError):
            await reads.call("counts", (), {})
        await asyncio.sleep(0)
    reads.close()


async def test_where_the_database_fails_the_actor_is_asked(world: JobsWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RecordsUnavailable("read")

    async with reading(world) as reads:
        monkeypatch.setattr(reads._records, "read", fail)
        with pytest.raises(NotReadableError):
            await reads.call("counts", (), {})


def test_what_is_read_directly_never_writes(world: JobsWorld) -> None:
    record = world.create(JobKind.TRAINING, runpod_id="r")
    calls = {
        "get": (record.id,),
        "get_by_runpod_id": ("r",),
        "list": ("default",),
        "queued": (JobKind.TRAINING,),
        "events": (record.id,),
        "issued_keys": (),
    }

    def refuse(_: str) -> None:
        raise AssertionError("a read wrote")

    world.records.write = refuse  # type: ignore[assignment, method-assign]
    more = {
        "get_by_runpod_id": {"tenant": "default"},
        "events": {"tenant": "default"},
        "issued_keys": {"valid_only": True},
    }
    for name in READS:
        getattr(world.jobs, name)(*calls.get(name, ()), **more.get(name, {}))


def test_a_reader_makes_no_database_and_writes_to_none(tmp_path: Path) -> None:
    path = tmp_path / "records.db"
    with pytest.raises(RecordsUnavailable):
        Records(f"sqlite:///{path}", read_only=True)
    assert not path.exists()
    Records(f"sqlite:///{path}").close()
    reader = Records(f"sqlite:///{path}", read_only=True)
    with pytest.raises((RecordsFailed, RecordsUnavailable)), reader.write("test") as tx:
        tx.set_flag("x")
    reader.close()
