import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.errors import StorageFailed, StorageUnavailable
from storage.job_record import LAUNCHER_OWNER, JobRecord
from storage.job_state import JobKind, JobState
from storage.jobs_testing import JobsWorld
from storage.keys import Keys
from storage.mirror import FlushReport, Mirror, RestoreReport
from storage.testing import InMemoryStore
from tests.storage.postgres import database


@pytest.fixture(params=["sqlite", "postgres"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def world(tmp_path: Path, kind: str) -> Iterator[JobsWorld]:
    with database(kind) as url:
        world = JobsWorld(tmp_path / "first", url=url)
        yield world
        world.close()


@pytest.fixture
def empty(tmp_path: Path, kind: str) -> Iterator[JobsWorld]:
    with database(kind) as url:
        world = JobsWorld(tmp_path / "second", url=url)
        yield world
        world.close()


def _key(record: JobRecord) -> str:
    return Keys("raylora", "default").process_record(record.id)


async def test_each_transition_is_written_where_the_tenant_does_not_matter(world: JobsWorld):
    store = InMemoryStore()
    mirror = Mirror(world.records, store, "raylora")
    record = world.create(tenant="matt")
    assert await mirror.flush() == FlushReport(written=1, failed=0)
    assert store.keys() == [f"raylora/processes/{record.id}.json"]
    assert JobRecord.model_validate_json(await store.get(_key(record))) == record
    [claimed] = world.jobs.claim(JobKind.GENERATION, "w1")
    await mirror.flush()
    assert json.loads(await store.get(_key(record)))["state"] == claimed.state == JobState.STARTING
    assert await mirror.flush() == FlushReport(written=0, failed=0)


async def test_progress_alone_is_not_written(world: JobsWorld):
    mirror = Mirror(world.records, InMemoryStore(), "raylora")
    record = world.running("w1")
    await mirror.flush()
    world.jobs.heartbeat(record.id, "w1", progress={"step": 1})
    assert (await mirror.flush()).written == 0


async def test_what_the_store_did_not_take_is_late_and_not_lost(world: JobsWorld):
    store = InMemoryStore()
    mirror = Mirror(world.records, store, "raylora")
    record = world.create()
    store.break_down(StorageUnavailable("put", 7.0))
    assert await mirror.flush() == FlushReport(written=0, failed=1, retry_after_s=7.0)
    world.restart()
    world.jobs.claim(JobKind.GENERATION, "w1")
    store.recover()
    assert (await Mirror(world.records, store, "raylora").flush()).written == 1
    assert json.loads(await store.get(_key(record)))["state"] == "STARTING"
    assert world.jobs.health().mirror_pending == 0


async def test_one_record_that_fails_holds_up_no_other(world: JobsWorld):
    store = InMemoryStore()
    mirror = Mirror(world.records, store, "raylora")
    world.create()
    second = world.create()
    store.fail("put", StorageFailed("put", 1, "server_error"))
    assert await mirror.flush() == FlushReport(written=1, failed=1, retry_after_s=5.0)
    assert store.keys() == [_key(second)]
    assert (await mirror.flush()).written == 1


async def test_a_change_while_its_record_is_written_is_written_too(world: JobsWorld):
    class ClaimsDuringPut(InMemoryStore):
        async def put_many(self, items):
            world.jobs.claim(JobKind.GENERATION, "w1")
            return await super().put_many(items)

    store = ClaimsDuringPut()
    record = world.create()
    mirror = Mirror(world.records, store, "raylora")
    await mirror.flush()
    assert json.loads(await store.get(_key(record)))["state"] == "QUEUED"
    await mirror.flush()
    assert json.loads(await store.get(_key(record)))["state"] == "STARTING"


async def test_an_empty_database_gets_its_records_back(world: JobsWorld, empty: JobsWorld):
    store = InMemoryStore()
    done = world.running("w1")
    world.jobs.complete(done.id, "w1", {"images": [1]})
    world.create(tenant="matt", runpod_id="r", notes={"warnings": ["x"]})
    await Mirror(world.records, store, "raylora").flush()
    assert await Mirror(empty.records, store, "raylora").restore() == RestoreReport(restored=2, unreadable=0)
    for tenant in ("default", "matt"):
        assert empty.jobs.list(tenant).records == world.jobs.list(tenant).records
    assert empty.jobs.health().mirror_pending == 0
    assert empty.jobs.health().restored


async def test_a_restored_training_is_watched_again(world: JobsWorld, empty: JobsWorld):
    store = InMemoryStore()
    record = world.claimed(LAUNCHER_OWNER, JobKind.TRAINING)
    world.jobs.attach(record.id, owner=LAUNCHER_OWNER, submission_id=record.id)
    await Mirror(world.records, store, "raylora").flush()
    await Mirror(empty.records, store, "raylora").restore()
    assert [submission.submission_id for submission in empty.jobs.submissions()] == [record.id]


async def test_a_database_looks_for_its_records_once(world: JobsWorld, empty: JobsWorld):
    store = InMemoryStore()
    assert await Mirror(empty.records, store, "raylora").restore() == RestoreReport(restored=0, unreadable=0)
    world.create()
    await Mirror(world.records, store, "raylora").flush()
    empty.restart()
    assert await Mirror(empty.records, store, "raylora").restore() is None
    assert empty.jobs.list("default").records == ()


async def test_a_store_that_is_away_is_asked_again_and_newer_records_are_kept(world: JobsWorld, empty: JobsWorld):
    store = InMemoryStore()
    old = world.create(job_id="gen_0123456789ab")
    await Mirror(world.records, store, "raylora").flush()
    mirror = Mirror(empty.records, store, "raylora")
    store.break_down(StorageUnavailable("list", 1.0))
    with pytest.raises(StorageUnavailable):
        await mirror.restore()
    assert not empty.jobs.health().restored
    empty.clock.advance(60)
    new = empty.create()
    store.recover()
    assert await mirror.restore() == RestoreReport(restored=1, unreadable=0)
    assert [record.id for record in empty.jobs.list("default").records] == [new.id, old.id]


async def test_a_torn_object_is_counted_and_the_others_are_restored(world: JobsWorld, empty: JobsWorld):
    store = InMemoryStore()
    torn, whole = world.create(), world.create()
    await Mirror(world.records, store, "raylora").flush()
    await store.put(_key(torn), (await store.get(_key(torn)))[:40])
    assert await Mirror(empty.records, store, "raylora").restore() == RestoreReport(restored=1, unreadable=1)
    assert [record.id for record in empty.jobs.list("default").records] == [whole.id]
