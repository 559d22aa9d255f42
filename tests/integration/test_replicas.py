"""Inference replicas in a real cluster: none while nobody asks, more while many wait, and an end to what they run.

The replicas' engine is a stand-in that waits for a file; what starts, chooses and stops replicas is the real thing.
"""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

with warnings.catch_warnings():
    # Serve's own use of an older pydantic spelling, warned of once, at import.
    warnings.simplefilter("ignore")
    from ray import serve

from serve_app.app import inference_deployment
from serve_app.collaborators import DispatchLoad
from serve_app.dispatch.dispatcher import GenerationDispatcher
from serve_app.handles import HandleInference, worker_counts
from serve_app.inference.plan import GenerationRequest, GenerationWork, ResolvedLora
from serve_app.settings import AutoscalingSettings, Settings
from storage.async_jobs import AsyncJobs
from storage.job_record import JobRecord, NewJob
from storage.job_state import JobKind, JobState
from storage.jobs_testing import JobsWorld
from train_jobs.generate_spec import GenerateSpec

pytestmark = [pytest.mark.usefixtures("serving"), pytest.mark.timeout(600)]

APPLICATION = "replicas"
PATIENCE_S = 240.0


@pytest.fixture(scope="module")
def serving(ray_cluster: str) -> Iterator[None]:
    serve.start(proxy_location="Disabled")
    yield
    serve.shutdown()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[JobsWorld]:
    world = JobsWorld(tmp_path)
    yield world
    world.close()


def waiting_engine() -> type:
    """A class of this function, so that it travels to the replicas by value."""

    class WaitingEngine:
        async def generate(self, work: GenerationWork) -> AsyncIterator[dict[str, Any]]:
            yield {}
            may_end = Path(work.request["spec"]["prompts"][0])
            while not await asyncio.to_thread(may_end.exists):  # noqa: ASYNC110 - the signal is another process's
                await asyncio.sleep(0.05)
            yield {"output": {"images": [], "replica": serve.get_replica_context().replica_id.unique_id}}

    return WaitingEngine


def deploy(settings: Settings) -> HandleInference:
    application = inference_deployment(settings, waiting_engine()).bind()
    return HandleInference(serve.run(application, name=APPLICATION, route_prefix=None))


def running_replicas() -> int:
    application = serve.status().applications.get(APPLICATION)
    # Serve names no deployment of an application that it is deleting.
    deployment = None if application is None else application.deployments.get("Inference")
    states = {} if deployment is None else deployment.replica_states
    named = {str(state): count for state, count in states.items()}
    return worker_counts(named, DispatchLoad(running=0, slots=1)).ready


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not await asyncio.to_thread(condition):  # noqa: ASYNC110 - Serve announces nothing
            await asyncio.sleep(0.2)


class Scene:
    def __init__(self, world: JobsWorld, folder: Path, settings: Settings) -> None:
        self.jobs = AsyncJobs(world.jobs)
        self.folder = folder
        slots = settings.replicas_max() * settings.generations_per_replica
        self.dispatcher = GenerationDispatcher(
            self.jobs, deploy(settings), owner="d", slots=slots, heartbeat_s=0.2, drain_s=1.0
        )

    async def submit(self, name: str, *adapters: str) -> str:
        spec = GenerateSpec(prompts=(str(self.folder / name),), model="tiny", seed=1)
        loras = tuple(ResolvedLora(id=None, key=key, sha256=None, scale=1.0) for key in adapters)
        request = GenerationRequest(spec=spec, loras=loras).as_json()
        record = await self.jobs.create(
            NewJob(kind=JobKind.GENERATION, tenant="matt", request=request, timeout_s=PATIENCE_S)
        )
        self.dispatcher.wake()
        return record.id

    def let_end(self, *names: str) -> None:
        for name in names:
            (self.folder / name).touch()

    async def state_is(self, job_id: str, state: JobState) -> JobRecord:
        async with asyncio.timeout(PATIENCE_S):
            while (record := await self.jobs.get(job_id)).state is not state:
                assert not record.state.is_terminal, record
                await asyncio.sleep(0.1)
        return record

    async def replica_of(self, job_id: str) -> str:
        record = await self.state_is(job_id, JobState.COMPLETED)
        assert record.output is not None
        return str(record.output["replica"])

    @asynccontextmanager
    async def dispatching(self) -> AsyncIterator[None]:
        loop = asyncio.create_task(self.dispatcher.run())
        try:
            yield
        finally:
            loop.cancel()
            with pytest.raises(asyncio.CancelledError):
                await loop


async def test_a_queue_starts_replicas_from_none_and_they_end_when_it_is_empty(
    world: JobsWorld, tmp_path: Path
) -> None:
    scaling = AutoscalingSettings(
        replicas_min=0, replicas_max=2, generations_target=1, averaged_over_s=10.5, grow_after_s=0, shrink_after_s=1
    )
    scene = Scene(world, tmp_path, Settings(autoscaling=scaling))
    assert running_replicas() == 0
    async with scene.dispatching():
        first = await scene.submit("a")
        await scene.state_is(first, JobState.RUNNING)
        others = [await scene.submit("a") for _ in range(3)]
        await until(lambda: running_replicas() == 2)
        scene.let_end("a")
        for job_id in (first, *others):
            await scene.state_is(job_id, JobState.COMPLETED)
        await until(lambda: running_replicas() == 0)
    serve.delete(APPLICATION)


async def test_generations_go_where_their_adapter_is_and_elsewhere_where_that_replica_is_busy_and_a_stop_waits_for_them(
    world: JobsWorld, tmp_path: Path
) -> None:
    scene = Scene(world, tmp_path, Settings(inference_replicas=2, drain_s=PATIENCE_S))
    scene.let_end("at once")
    async with scene.dispatching():
        first = await scene.replica_of(await scene.submit("at once", "x", "y"))
        for _ in range(5):
            assert await scene.replica_of(await scene.submit("at once", "x", "y")) == first
        held = [await scene.submit("b", "x", "y") for _ in range(5)]
        for job_id in held:
            await scene.state_is(job_id, JobState.RUNNING)
        await asyncio.to_thread(serve.delete, APPLICATION, False)
        await until(lambda: running_replicas() == 0)
        scene.let_end("b")
        assert len({await scene.replica_of(job_id) for job_id in held}) == 2
