import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from storage.errors import StorageUnavailable
from storage.job_record import JobRecord, NewJob
from storage.job_state import JobKind, JobState
from storage.jobs_config import JobsConfig
from storage.jobs_service import JobsService
from storage.jobs_testing import ManualClock, ScriptedLauncher
from storage.settings import RecordsSettings, S3Settings
from storage.testing import InMemoryStore


class Naps:
    """Stands for sleep: each nap lasts until the event loop has nothing better to do. `taken` are the times asked."""

    def __init__(self) -> None:
        self.taken: list[float] = []

    async def __call__(self, seconds: float) -> None:
        self.taken.append(seconds)
        await asyncio.sleep(0)


class Setting:
    def __init__(self, folder: Path) -> None:
        self.config = JobsConfig(
            records=RecordsSettings(url=f"sqlite:///{folder / 'jobs.sqlite'}"), s3=S3Settings(), restore_wait_s=5
        )
        self.clock = ManualClock()
        self.launcher = ScriptedLauncher()
        self.store = InMemoryStore()
        self.naps = Naps()

    def service(self) -> JobsService:
        return JobsService(self.config, self.launcher, self.store, clock=self.clock, sleep=self.naps)


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    return Setting(tmp_path)


@asynccontextmanager
async def _running(service: JobsService) -> AsyncIterator[JobsService]:
    await service.open()
    task = asyncio.create_task(service.run())
    try:
        yield service
    finally:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        service.close()


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - the store and the launcher have no events
            await asyncio.sleep(0)


async def _create(service: JobsService, kind: JobKind) -> JobRecord:
    return await service.jobs.create(NewJob(kind=kind, tenant="default", request={}))


async def test_records_are_mirrored_behind_the_calls(setting: Setting):
    async with _running(setting.service()) as service:
        record = await _create(service, JobKind.GENERATION)
        await _until(lambda: setting.store.keys() == [f"raylora/processes/{record.id}.json"])


async def test_lost_leases_are_swept(setting: Setting):
    async with _running(setting.service()) as service:
        record = await _create(service, JobKind.GENERATION)
        [claimed] = await service.jobs.claim(JobKind.GENERATION, "w1")
        waiting = asyncio.create_task(
            service.jobs.wait(record.id, tenant=None, timeout_s=30, until="change", since=claimed.updated_at)
        )
        setting.clock.advance(31)
        swept = await waiting
        assert (swept.state, swept.attempt) == (JobState.QUEUED, 2)


async def test_trainings_are_submitted_and_watched(setting: Setting):
    async with _running(setting.service()) as service:
        record = await _create(service, JobKind.TRAINING)
        await _until(lambda: setting.launcher.submitted == [record.id])
        setting.launcher.statuses[record.id] = "FAILED"
        await _until(lambda: setting.launcher.submitted == [record.id, f"{record.id}-r2"])


async def test_an_empty_database_is_restored_before_it_is_used(setting: Setting, tmp_path: Path):
    async with _running(setting.service()) as service:
        record = await _create(service, JobKind.GENERATION)
        await _until(lambda: len(setting.store.keys()) == 1)
    other = Setting(tmp_path / "other")
    other.store = setting.store
    service = other.service()
    await service.open()
    assert await service.jobs.get(record.id) == record
    service.close()


async def test_a_store_that_is_away_at_the_start_delays_the_records_only(setting: Setting, tmp_path: Path):
    async with _running(setting.service()) as service:
        record = await _create(service, JobKind.GENERATION)
        await _until(lambda: len(setting.store.keys()) == 1)
    setting.store.break_down(StorageUnavailable("list", 7.0))
    other = Setting(tmp_path / "other")
    other.store = setting.store
    async with _running(other.service()) as service:
        new = await _create(service, JobKind.GENERATION)
        assert [r.id for r in (await service.jobs.list("default")).records] == [new.id]
        setting.store.recover()
        await _until(lambda: len(setting.store.keys()) == 2)
        assert (await service.jobs.get(record.id)).id == record.id


async def test_the_mirror_catches_up_seconds_after_the_store_is_back_however_long_that_asked_it_to_wait(
    setting: Setting,
):
    async with _running(setting.service()) as service:
        await _until(lambda: setting.store.calls["list"] == 1)
        setting.store.break_down(StorageUnavailable("put", 60.0))
        records = [await _create(service, JobKind.GENERATION) for _ in range(70)]
        await _until(lambda: setting.store.calls["put"] > 2 * len(records))
        assert max(setting.naps.taken) <= 2.0
        setting.store.recover()
        await _until(lambda: len(setting.store.keys()) == len(records))


async def test_a_fault_in_one_pass_does_not_end_the_passes(setting: Setting, caplog: pytest.LogCaptureFixture):
    service = setting.service()
    reap, faults = service.jobs.reap, [RuntimeError("a bug")]

    async def faulty_reap() -> list[JobRecord]:
        if faults:
            raise faults.pop()
        return await reap()

    service.jobs.reap = faulty_reap
    async with _running(service):
        record = await _create(service, JobKind.GENERATION)
        await service.jobs.claim(JobKind.GENERATION, "w1")
        setting.clock.advance(31)
        await _until(lambda: f"{record.id} was swept" in caplog.text)
    assert "sweep failed" in caplog.text
