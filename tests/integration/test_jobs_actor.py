"""The jobs actor in a real Ray cluster: what a death of it costs."""

import asyncio
import pickle
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.exceptions import ActorDiedError

from storage.actor import StorageClient
from storage.blocking_jobs import BlockingJobs
from storage.embedded import EmbeddedS3
from storage.errors import JobNotFound, JobsUnavailable, LeaseLost
from storage.job_record import LAUNCHER_OWNER, JobRecord, NewJob
from storage.job_state import JobKind, JobState
from storage.jobs_actor import ACTOR_NAME, ensure_jobs_actor
from storage.jobs_client import JobsClient
from storage.jobs_config import JobsConfig
from storage.objects import ObjectStore
from storage.settings import RecordsSettings, S3Settings
from storage.testing import InMemoryStore
from storage.training_queue import TrainingLauncher

pytestmark = pytest.mark.usefixtures("ray_cluster")

PATIENCE_S = 180.0


def _launcher(folder: Path) -> TrainingLauncher:
    """A cluster whose jobs are files holding their status, so that the test and the actor see the same."""

    class FileLauncher:
        def submit(self, job_id: str, attempt: int) -> str:
            submission_id = job_id if attempt == 1 else f"{job_id}-r{attempt}"
            (folder / submission_id).write_text("PENDING")
            return submission_id

        def status(self, submission_id: str) -> str:
            path = folder / submission_id
            return path.read_text() if path.exists() else "UNKNOWN"

        def stop(self, submission_id: str) -> None:
            (folder / submission_id).write_text("STOPPED")

    return FileLauncher()


class Setting:
    def __init__(self, folder: Path) -> None:
        self.namespace = f"jobs-{uuid.uuid4().hex[:8]}"
        self.ray_jobs = folder / "ray-jobs"
        self.ray_jobs.mkdir()
        self.config = JobsConfig(
            records=RecordsSettings(url=f"sqlite:///{folder / 'jobs.sqlite'}"),
            s3=S3Settings(),
            sweep_interval_s=0.1,
            queue_interval_s=0.1,
        )

    def start(self, store: ObjectStore | None = None) -> JobsClient:
        ensure_jobs_actor(self.config, _launcher(self.ray_jobs), store=store, namespace=self.namespace)
        # On a busy machine an actor takes its time to come back.
        return JobsClient(namespace=self.namespace, unavailable_after_s=PATIENCE_S)

    def kill(self, *, for_good: bool = False) -> None:
        ray.kill(ray.get_actor(ACTOR_NAME, namespace=self.namespace), no_restart=for_good)


@pytest.fixture
def setting(tmp_path: Path) -> Iterator[Setting]:
    setting = Setting(tmp_path)
    yield setting
    setting.kill(for_good=True)


def _new(kind: JobKind = JobKind.GENERATION, **fields: object) -> NewJob:
    return NewJob.model_validate({"kind": kind, "tenant": "default", "request": {"prompt": "a cat"}} | fields)


async def _running(client: JobsClient) -> JobRecord:
    record = await client.create(_new())
    await client.claim(JobKind.GENERATION, "w1", lease_s=PATIENCE_S)
    return await client.start(record.id, "w1", lease_s=PATIENCE_S)


def _wait_for_file(path: Path) -> None:
    """Another process writes it, so there is no event to wait for."""
    ends_at = time.monotonic() + PATIENCE_S
    while not path.exists():
        assert time.monotonic() < ends_at, f"{path.name} did not appear"
        time.sleep(0.05)


async def _appears(path: Path) -> None:
    await asyncio.to_thread(_wait_for_file, path)


async def test_a_long_poll_ends_with_the_job_and_holds_up_no_other_call(setting: Setting):
    client = setting.start(InMemoryStore())
    record = await _running(client)
    waiting = [asyncio.create_task(client.wait(record.id, tenant="default", timeout_s=PATIENCE_S)) for _ in range(300)]
    await client.heartbeat(record.id, "w1", progress={"step": 1}, lease_s=PATIENCE_S)
    done = await client.complete(record.id, "w1", {"images": []})
    assert await asyncio.gather(*waiting) == [done] * 300


async def test_records_are_true_after_a_death_and_clients_find_the_actor_again(setting: Setting):
    client = setting.start(InMemoryStore())
    record = await _running(client)
    waiting = asyncio.create_task(client.wait(record.id, tenant="default", timeout_s=PATIENCE_S))
    await asyncio.sleep(0)
    setting.kill()
    assert await client.get(record.id) == record
    again = await client.create(_new(idempotency_key="k", body_sha256="a"))
    assert await client.create(_new(idempotency_key="k", body_sha256="a")) == again
    done = await client.complete(record.id, "w1", {"images": []})
    assert (await waiting) == done


async def test_after_a_death_for_good_the_same_client_finds_the_next_actor(setting: Setting):
    client = setting.start(InMemoryStore())
    record = await client.create(_new())
    setting.kill(for_good=True)
    setting.start(InMemoryStore())
    assert await client.get(record.id) == record


async def test_a_client_beside_the_database_reads_on_while_no_actor_is_there(setting: Setting):
    setting.start(InMemoryStore())
    client = JobsClient(namespace=setting.namespace, unavailable_after_s=PATIENCE_S, reads_directly=True)
    record = await _running(client)
    ends_at = time.monotonic() + PATIENCE_S
    while not client.reads_directly():
        assert await client.get(record.id) == record
        assert time.monotonic() < ends_at
        await asyncio.sleep(0.05)
    setting.kill(for_good=True)
    assert await client.get(record.id) == record
    assert (await client.list("default")).records == (record,)
    setting.start(InMemoryStore())
    done = await client.complete(record.id, "w1", {"images": []})
    assert await client.get(record.id) == done


async def test_a_creation_whose_answer_was_lost_makes_no_second_job(setting: Setting):
    client = setting.start(InMemoryStore())
    creating = [asyncio.create_task(client.create(_new())) for _ in range(20)]
    await asyncio.sleep(0)
    setting.kill()
    records = await asyncio.gather(*creating)
    assert len({record.id for record in records}) == 20
    assert (await client.counts())[JobState.QUEUED] == 20


async def test_trainings_are_watched_from_the_restart_on_though_nobody_calls(setting: Setting):
    client = setting.start(InMemoryStore())
    record = await client.create(_new(JobKind.TRAINING))
    await _appears(setting.ray_jobs / record.id)
    (setting.ray_jobs / record.id).write_text("RUNNING")
    adopted = await client.adopt(record.id, "driver", PATIENCE_S, submission_id=record.id)
    assert adopted.lease_owner == "driver"
    await client.start(record.id, "driver", lease_s=PATIENCE_S)
    setting.kill()
    (setting.ray_jobs / record.id).write_text("FAILED")
    await _appears(setting.ray_jobs / f"{record.id}-r2")
    resumed = await client.get(record.id)
    assert (resumed.attempt, resumed.lease_owner) == (2, LAUNCHER_OWNER)


async def test_errors_arrive_as_they_were_raised(setting: Setting):
    client = setting.start(InMemoryStore())
    with pytest.raises(JobNotFound) as raised:
        await client.get("gen_ffffffffffff")
    assert type(raised.value) is JobNotFound
    assert raised.value.job_id == "gen_ffffffffffff"
    record = await _running(client)
    with pytest.raises(LeaseLost) as lost:
        await client.heartbeat(record.id, "w2")
    assert "Traceback" not in str(lost.value)


def test_blocking_jobs_do_the_same_and_clients_travel(setting: Setting):
    client = setting.start(InMemoryStore())

    @ray.remote(num_cpus=0)
    def work(pickled: bytes) -> str:
        jobs: BlockingJobs = pickle.loads(pickled)  # noqa: S301 - our own bytes
        record = jobs.create(_new_training())
        jobs.adopt(record.id, "driver", PATIENCE_S)
        jobs.start(record.id, "driver")
        assert not jobs.heartbeat(record.id, "driver", progress={"step": 1}).cancel_requested
        return jobs.complete(record.id, "driver", {"loras": []}).id

    def _new_training() -> NewJob:
        return NewJob(kind=JobKind.TRAINING, tenant="default", request={}, source="ray")

    jobs = BlockingJobs(client)
    job_id = ray.get(work.remote(pickle.dumps(jobs)), timeout=PATIENCE_S)
    assert jobs.wait(job_id, tenant="default", timeout_s=PATIENCE_S).output == {"loras": []}
    assert jobs.cluster_config() == setting.config
    assert jobs.health().restored
    jobs.close()


async def test_without_an_actor_a_call_ends_with_an_error(setting: Setting):
    setting.start(InMemoryStore())
    client = JobsClient(namespace="nobody-is-here", unavailable_after_s=0.2)
    with pytest.raises(JobsUnavailable):
        await client.counts()


async def test_an_actor_with_another_configuration_is_replaced_and_its_records_stay(
    setting: Setting, caplog: pytest.LogCaptureFixture
):
    record = await _running(setting.start(InMemoryStore()))
    setting.config = setting.config.model_copy(update={"training_slots": 3})
    client = setting.start(InMemoryStore())
    assert (await client.cluster_config()).training_slots == 3
    assert (await client.get(record.id)).lease_owner == "w1"
    assert "another configuration" in caplog.text
    actor = ray.get_actor(ACTOR_NAME, namespace=setting.namespace)
    setting.start(InMemoryStore())
    assert ray.get_actor(ACTOR_NAME, namespace=setting.namespace) == actor


async def test_a_lost_database_comes_back_from_object_storage(setting: Setting, embedded_s3: EmbeddedS3):
    prefix = f"raylora/{uuid.uuid4().hex[:8]}"
    s3 = embedded_s3.settings().model_copy(update={"prefix": prefix})
    setting.config = setting.config.model_copy(update={"s3": s3})
    store = StorageClient(s3, setting.config.breaker)
    await store.ensure_bucket()
    client = setting.start()
    record = await _running(client)
    done = await client.complete(record.id, "w1", {"images": []})
    async with asyncio.timeout(PATIENCE_S):
        while (await client.health()).mirror_pending:  # noqa: ASYNC110 - another process writes the mirror
            await asyncio.sleep(0.05)
    setting.kill(for_good=True)
    url = setting.config.records.url.replace("jobs.sqlite", "empty.sqlite")
    setting.config = setting.config.model_copy(update={"records": RecordsSettings(url=url)})
    client = setting.start()
    assert await client.get(record.id) == done
    assert (await client.health()).restored


def test_an_actor_that_cannot_open_its_records_is_said_at_once(tmp_path: Path):
    setting = Setting(tmp_path)
    (tmp_path / "a-file").touch()
    records = RecordsSettings(url=f"sqlite:///{tmp_path / 'a-file' / 'jobs.sqlite'}")
    setting.config = setting.config.model_copy(update={"records": records})
    with pytest.raises(JobsUnavailable) as raised:
        setting.start(InMemoryStore())
    assert isinstance(raised.value.__cause__, ActorDiedError)
    assert raised.value.__cause__.actor_init_failed
