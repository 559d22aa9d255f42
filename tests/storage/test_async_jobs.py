import asyncio
from collections.abc import Iterator
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path

import pytest

from storage.async_jobs import AsyncJobs
from storage.errors import JobNotFound
from storage.job_record import NewJob
from storage.job_state import JobKind, JobState
from storage.jobs_testing import JobsWorld
from storage.records import RecordsTx

LONG_S = 60.0


@pytest.fixture
def world(tmp_path: Path) -> Iterator[JobsWorld]:
    world = JobsWorld(tmp_path)
    yield world
    world.close()


def _new() -> NewJob:
    return NewJob(kind=JobKind.GENERATION, tenant="default", request={})


async def _settle_down() -> None:
    """Let tasks that only wait for one another run until they wait for something else."""
    for _ in range(20):
        await asyncio.sleep(0)


async def test_a_creation_gets_its_id_before_it_is_sent(world: JobsWorld):
    jobs = AsyncJobs(world.jobs)
    first, second = await jobs.create(_new()), await jobs.create(_new())
    assert first.id != second.id
    assert (await jobs.get(first.id)).state is JobState.QUEUED


async def test_all_methods_reach_the_life_cycle(world: JobsWorld):
    jobs = AsyncJobs(world.jobs)
    record = await jobs.create(_new())
    assert [r.id for r in await jobs.claim(JobKind.GENERATION, "w1", limit=2)] == [record.id]
    await jobs.adopt(record.id, "w1", 30)
    await jobs.attach(record.id, owner="w1", submission_id="s")
    await jobs.start(record.id, "w1")
    await jobs.request_cancel(record.id, tenant="default")
    assert (await jobs.heartbeat(record.id, "w1", progress={"step": 1})).cancel_requested
    assert (await jobs.cancelled(record.id, "w1")).state is JobState.CANCELLED
    assert (await jobs.counts())[JobState.CANCELLED] == 1
    assert await jobs.retried() == 0
    assert await jobs.reap() == []
    await jobs.create(_new())
    assert await jobs.purge_queue("default") == 1
    assert len((await jobs.list("default")).records) == 2
    assert (await jobs.health()).mirror_pending == 2


async def test_a_wait_ends_with_the_job(world: JobsWorld):
    jobs = AsyncJobs(world.jobs)
    record = world.running("w1")
    waiting = asyncio.create_task(jobs.wait(record.id, tenant="default", timeout_s=LONG_S))
    await jobs.heartbeat(record.id, "w1", progress={"step": 1})
    await jobs.complete(record.id, "w1", {"images": []})
    assert (await waiting).state is JobState.COMPLETED


async def test_a_wait_for_an_ended_job_returns_at_once(world: JobsWorld):
    record = world.running("w1")
    world.jobs.complete(record.id, "w1", {})
    jobs = AsyncJobs(world.jobs)
    for until in ("final", "change"):
        assert (await jobs.wait(record.id, tenant=None, timeout_s=LONG_S, until=until)).state is JobState.COMPLETED


async def test_a_wait_that_expires_returns_the_record_as_it_is(world: JobsWorld):
    record = world.create()
    assert await AsyncJobs(world.jobs).wait(record.id, tenant="default", timeout_s=0) == record


async def test_a_wait_for_a_change_returns_what_changed_since(world: JobsWorld):
    jobs = AsyncJobs(world.jobs)
    record = world.running("w1")
    before = record.updated_at - timedelta(seconds=1)
    assert await jobs.wait(record.id, tenant=None, timeout_s=LONG_S, until="change", since=before) == record
    waiting = asyncio.create_task(
        jobs.wait(record.id, tenant=None, timeout_s=LONG_S, until="change", since=record.updated_at)
    )
    await jobs.heartbeat(record.id, "w1", progress={"step": 7})
    assert (await waiting).progress == {"step": 7}


async def test_a_change_by_another_thread_wakes_every_waiter(world: JobsWorld):
    jobs = AsyncJobs(world.jobs)
    record = world.running("w1")
    waiting = [asyncio.create_task(jobs.wait(record.id, tenant=None, timeout_s=LONG_S)) for _ in range(50)]
    await _settle_down()
    await asyncio.to_thread(world.jobs.complete, record.id, "w1", {})
    assert {r.state for r in await asyncio.gather(*waiting)} == {JobState.COMPLETED}


async def test_a_wait_for_an_unknown_or_foreign_job_is_refused(world: JobsWorld):
    jobs = AsyncJobs(world.jobs)
    record = world.create(tenant="matt")
    for job_id, tenant in ((record.id, "matt2"), ("gen_ffffffffffff", None)):
        with pytest.raises(JobNotFound):
            await jobs.wait(job_id, tenant=tenant, timeout_s=LONG_S)


async def test_a_cancelled_wait_leaves_nothing_behind(world: JobsWorld):
    jobs = AsyncJobs(world.jobs)
    record = world.create()
    waiting = asyncio.create_task(jobs.wait(record.id, tenant=None, timeout_s=LONG_S))
    await jobs.get(record.id)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert jobs._watchers == {}


async def test_a_waiter_reads_the_database_once_however_much_changes(world: JobsWorld):
    jobs = AsyncJobs(world.jobs)
    record = world.running("w1")
    reads: list[str] = []
    read = world.records.read

    def counting_read(operation: str) -> AbstractContextManager[RecordsTx]:
        reads.append(operation)
        return read(operation)

    world.records.read = counting_read
    waiting = asyncio.create_task(jobs.wait(record.id, tenant=None, timeout_s=LONG_S))
    for step in range(20):
        await jobs.heartbeat(record.id, "w1", progress={"step": step})
    await jobs.complete(record.id, "w1", {})
    assert (await waiting).state is JobState.COMPLETED
    assert reads == ["get"]
