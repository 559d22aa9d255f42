"""The dispatcher over real records and a scripted replica. `Ticks` stands in for time."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from diffusion.errors import LoraMismatch
from serve_app.dispatch.dispatcher import GenerationDispatcher
from serve_app.errors import ServiceUnavailable
from serve_app.inference.plan import GenerationRequest, GenerationWork
from serve_app.testing import ScriptedInference
from storage.async_jobs import AsyncJobs
from storage.errors import JobsUnavailable, StorageFailed
from storage.job_record import JobRecord, NewJob
from storage.job_state import JobKind, JobState
from storage.jobs_testing import JobsWorld
from storage.testing import InMemoryStore
from train_jobs.generate_spec import GenerateSpec

SECRET = "http://host/key?X-Amz-Signature=abc"


class Ticks:
    """Sleeps end when `tick` is called, all of them."""

    def __init__(self) -> None:
        self._next = asyncio.Event()

    async def sleep(self, seconds: float) -> None:
        await self._next.wait()

    def tick(self) -> None:
        self._next.set()
        self._next = asyncio.Event()


class Scene:
    def __init__(
        self, world: JobsWorld, slots: int = 2, drain_s: float = 0.0, inference: ScriptedInference | None = None
    ) -> None:
        self.world = world
        self.jobs = AsyncJobs(world.jobs)
        self.ticks = Ticks()
        self.inference = inference or ScriptedInference(InMemoryStore(now=world.clock))
        self.dispatcher = GenerationDispatcher(
            self.jobs, self.inference, owner="dispatcher-1", slots=slots, drain_s=drain_s, sleep=self.ticks.sleep
        )

    async def submit(self, prompt: str = "a cat", **fields: Any) -> str:
        request = GenerationRequest(spec=GenerateSpec(prompts=(prompt,), model="tiny", seed=1)).as_json()
        fields.setdefault("timeout_s", 60.0)
        job = NewJob(kind=JobKind.GENERATION, tenant="matt", request=request, **fields)
        record = await self.jobs.create(job)
        self.dispatcher.wake()
        return record.id

    async def ended(self, job_id: str) -> JobRecord:
        return await self.jobs.wait(job_id, tenant="matt", timeout_s=20)

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not condition():
                await self.jobs.counts()

    async def under_way(self, job_id: str) -> None:
        async with asyncio.timeout(20):
            while (await self.jobs.get(job_id)).state is not JobState.RUNNING:
                pass

    async def ticking_until_ended(self, job_id: str) -> JobRecord:
        async with asyncio.timeout(20):
            while not (record := await self.jobs.get(job_id)).state.is_terminal:
                self.ticks.tick()
        return record

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        loop = asyncio.create_task(self.dispatcher.run())
        try:
            yield
        finally:
            loop.cancel()
            with pytest.raises(asyncio.CancelledError):
                await loop


@pytest.fixture
async def scene(world: JobsWorld) -> Scene:
    return Scene(world)


async def test_a_queued_generation_is_made_and_its_record_completed(scene: Scene) -> None:
    async with scene.running():
        record = await scene.ended(await scene.submit())
    assert record.state is JobState.COMPLETED
    assert record.output is not None
    [image] = record.output["images"]
    assert await scene.inference.store.exists(image["key"])
    assert image["seed"] == 1


class OnAWorker(ScriptedInference):
    """Says first who works, as a replica does across Ray."""

    async def generate(self, work: GenerationWork) -> AsyncGenerator[dict[str, Any], None]:
        yield {"worker_id": "gpu-1"}
        async for event in super().generate(work):
            yield event


async def test_the_record_names_the_worker(world: JobsWorld) -> None:
    scene = Scene(world, inference=OnAWorker(InMemoryStore(now=world.clock)))
    async with scene.running():
        assert (await scene.ended(await scene.submit())).worker_id == "gpu-1"


async def test_work_that_was_queued_before_the_start_is_found(scene: Scene) -> None:
    job_id = await scene.submit()
    async with scene.running():
        assert (await scene.ended(job_id)).state is JobState.COMPLETED


async def test_without_being_woken_it_looks_by_itself(scene: Scene) -> None:
    async with scene.running():
        await scene.until(lambda: scene.dispatcher.load().running == 0)
        job_id = scene.world.create(
            request=GenerationRequest(spec=GenerateSpec(prompts=("a",), model="tiny", seed=1)).as_json()
        ).id
        record = None
        async with asyncio.timeout(20):
            while record is None or not record.state.is_terminal:
                scene.ticks.tick()
                record = await scene.jobs.get(job_id)
    assert record.state is JobState.COMPLETED


async def test_no_more_run_at_once_than_there_are_slots(scene: Scene) -> None:
    scene.inference.gate = asyncio.Event()
    async with scene.running():
        ids = [await scene.submit(prompt) for prompt in "abc"]
        await scene.until(lambda: len(scene.inference.begun) == 2)
        assert (await scene.jobs.get(ids[2])).state is JobState.QUEUED
        assert scene.dispatcher.load().running == 2
        scene.inference.gate.set()
        assert (await scene.ended(ids[2])).state is JobState.COMPLETED


async def test_progress_reaches_the_record(scene: Scene) -> None:
    scene.inference.gate = asyncio.Event()
    async with scene.running():
        job_id = await scene.submit()
        await scene.until(lambda: len(scene.inference.begun) == 1)
        async with asyncio.timeout(20):
            while not (await scene.jobs.get(job_id)).progress:
                scene.ticks.tick()
        assert (await scene.jobs.get(job_id)).progress["total_steps"] == 2


async def test_a_cancelled_generation_really_stops(scene: Scene) -> None:
    scene.inference.gate = asyncio.Event()
    async with scene.running():
        job_id = await scene.submit()
        await scene.until(lambda: len(scene.inference.begun) == 1)
        await scene.jobs.request_cancel(job_id, tenant="matt")
        record = await scene.ticking_until_ended(job_id)
    assert record.state is JobState.CANCELLED
    assert scene.inference.stopped == [job_id]
    assert record.output is None


async def test_a_generation_over_its_time_is_stopped_and_timed_out(scene: Scene) -> None:
    scene.inference.gate = asyncio.Event()
    async with scene.running():
        job_id = await scene.submit(timeout_s=10.0)
        await scene.under_way(job_id)
        scene.world.clock.advance(11)
        record = await scene.ticking_until_ended(job_id)
    assert record.state is JobState.TIMED_OUT
    assert scene.inference.stopped == [job_id]


async def test_a_lost_lease_drops_the_work_and_leaves_the_record_to_its_new_owner(scene: Scene) -> None:
    # With one place, which this work keeps, the first dispatcher cannot be the one that claims the job again.
    scene = Scene(scene.world, slots=1)
    scene.inference.gate = asyncio.Event()
    async with scene.running():
        job_id = await scene.submit()
        await scene.under_way(job_id)
        scene.world.clock.advance(31)
        await scene.jobs.reap()
        [record] = await scene.jobs.claim(JobKind.GENERATION, "dispatcher-2")
        async with asyncio.timeout(20):
            while not scene.inference.stopped:
                scene.ticks.tick()
                await asyncio.sleep(0)
        assert record.id == job_id
        now = await scene.jobs.get(job_id)
    assert (now.lease_owner, now.state, now.attempt) == ("dispatcher-2", JobState.STARTING, 2)


async def test_a_passing_fault_is_tried_again(scene: Scene) -> None:
    scene.inference.errors = [ServiceUnavailable("inference")]
    async with scene.running():
        job_id = await scene.submit()
        async with asyncio.timeout(20):
            while not (record := await scene.jobs.get(job_id)).state.is_terminal:
                scene.ticks.tick()
    assert record.state is JobState.COMPLETED
    assert record.attempt == 2


async def test_a_lasting_fault_fails_when_the_attempts_are_used_up(scene: Scene) -> None:
    scene.inference.errors = [StorageFailed("get", 3, "server_error"), StorageFailed("get", 3, "server_error")]
    async with scene.running():
        record = await scene.ticking_until_ended(await scene.submit(attempts_max=2))
    assert record.state is JobState.FAILED
    assert record.error is not None
    assert record.error.code == "storage_failed"


async def test_a_request_that_cannot_work_fails_at_once_and_says_why(scene: Scene) -> None:
    scene.inference.errors = [LoraMismatch("rank 4 keys of another model")]
    async with scene.running():
        record = await scene.ended(await scene.submit())
    assert record.state is JobState.FAILED
    assert record.error is not None
    assert (record.error.code, record.attempt) == ("lora_mismatch", 1)


async def test_an_unexpected_errors_text_reaches_neither_record_nor_log(scene: Scene, caplog: Any) -> None:
    scene.inference.errors = [RuntimeError(SECRET)]
    async with scene.running():
        record = await scene.ended(await scene.submit())
    assert record.state is JobState.FAILED
    assert "Signature" not in record.model_dump_json() + caplog.text
    assert "RuntimeError" in caplog.text


async def test_records_that_do_not_answer_are_asked_again(scene: Scene, caplog: Any) -> None:
    claim, failures = scene.jobs.claim, [JobsUnavailable("claim")]

    async def flaky(*args: Any, **kwargs: Any) -> Any:
        if failures:
            raise failures.pop()
        return await claim(*args, **kwargs)

    scene.jobs.claim = flaky  # type: ignore[method-assign]
    async with scene.running():
        record = await scene.ticking_until_ended(await scene.submit())
    assert record.state is JobState.COMPLETED
    assert "jobs_unavailable" in caplog.text


async def test_a_result_is_offered_again_when_the_record_could_not_be_written(scene: Scene) -> None:
    complete, failures = scene.jobs.complete, [JobsUnavailable("complete")]

    async def flaky(*args: Any, **kwargs: Any) -> Any:
        if failures:
            raise failures.pop()
        return await complete(*args, **kwargs)

    scene.jobs.complete = flaky  # type: ignore[method-assign]
    async with scene.running():
        record = await scene.ticking_until_ended(await scene.submit())
    assert (record.state, len(scene.inference.begun)) == (JobState.COMPLETED, 1)


async def test_a_generation_is_not_running_before_a_replica_has_taken_it(scene: Scene) -> None:
    scene.inference.free = asyncio.Event()
    async with scene.running():
        job_id = await scene.submit(timeout_s=10.0)
        await scene.until(lambda: len(scene.inference.asked) == 1)
        scene.world.clock.advance(20)
        scene.ticks.tick()
        record = await scene.jobs.get(job_id)
        assert (record.state, record.started_at) == (JobState.STARTING, None)
        scene.inference.free.set()
        assert (await scene.ended(job_id)).state is JobState.COMPLETED


async def test_a_generation_that_waits_for_a_replica_can_be_cancelled(scene: Scene) -> None:
    scene.inference.free = asyncio.Event()
    async with scene.running():
        job_id = await scene.submit()
        await scene.until(lambda: len(scene.inference.asked) == 1)
        await scene.jobs.request_cancel(job_id, tenant="matt")
        assert (await scene.ticking_until_ended(job_id)).state is JobState.CANCELLED
    assert scene.inference.begun == []


async def test_told_to_stop_it_lets_what_runs_end_and_takes_nothing_new(world: JobsWorld) -> None:
    scene = Scene(world, drain_s=20.0)
    scene.inference.gate = asyncio.Event()
    loop = asyncio.create_task(scene.dispatcher.run())
    job_id = await scene.submit()
    await scene.under_way(job_id)
    loop.cancel()
    late = await scene.submit()
    scene.inference.gate.set()
    with pytest.raises(asyncio.CancelledError):
        await loop
    assert (await scene.jobs.get(job_id)).state is JobState.COMPLETED
    assert (await scene.jobs.get(late)).state is JobState.QUEUED


class SlowToSay(AsyncJobs):
    """Claims at once, and answers when it may."""

    def __init__(self, world: JobsWorld) -> None:
        super().__init__(world.jobs)
        self.claimed = asyncio.Event()
        self.may_answer = asyncio.Event()

    async def claim(self, *args: Any, **options: Any) -> list[JobRecord]:
        records = await super().claim(*args, **options)
        if records:
            self.claimed.set()
            await self.may_answer.wait()
        return records


async def test_told_to_stop_while_it_claims_it_hands_back_what_it_gets(world: JobsWorld) -> None:
    scene = Scene(world)
    jobs = SlowToSay(world)
    dispatcher = GenerationDispatcher(jobs, scene.inference, owner="dispatcher-2", slots=2, sleep=scene.ticks.sleep)
    job_id = await scene.submit(attempts_max=1)
    loop = asyncio.create_task(dispatcher.run())
    await jobs.claimed.wait()
    loop.cancel()
    jobs.may_answer.set()
    with pytest.raises(asyncio.CancelledError):
        await loop
    record = await scene.jobs.get(job_id)
    assert (record.state, record.lease_owner) == (JobState.QUEUED, None)
    assert scene.inference.begun == []


async def test_what_does_not_end_in_time_is_stopped_and_another_dispatcher_makes_it_as_the_same_attempt(
    scene: Scene,
) -> None:
    scene.inference.gate = asyncio.Event()
    async with scene.running():
        job_id = await scene.submit(attempts_max=1)
        await scene.under_way(job_id)
    assert scene.inference.stopped == [job_id]
    record = await scene.jobs.get(job_id)
    assert (record.state, record.attempt, record.lease_owner) == (JobState.QUEUED, 1, None)
    scene.inference.gate.set()
    after = Scene(scene.world)
    async with after.running():
        assert (await after.ended(job_id)).state is JobState.COMPLETED


async def test_a_stopped_generation_whose_cancelling_was_asked_for_is_cancelled(scene: Scene) -> None:
    scene.inference.gate = asyncio.Event()
    async with scene.running():
        job_id = await scene.submit()
        await scene.under_way(job_id)
        await scene.jobs.request_cancel(job_id, tenant="matt")
    assert (await scene.jobs.get(job_id)).state is JobState.CANCELLED


async def test_what_cannot_be_handed_back_is_queued_again_when_its_lease_has_run_out(scene: Scene, caplog: Any) -> None:
    async def unavailable(*args: Any, **kwargs: Any) -> Any:
        raise JobsUnavailable("hand_back")

    scene.inference.gate = asyncio.Event()
    scene.jobs.hand_back = unavailable  # type: ignore[method-assign]
    async with scene.running():
        job_id = await scene.submit()
        await scene.under_way(job_id)
    assert (await scene.jobs.get(job_id)).state is JobState.RUNNING
    assert "jobs_unavailable" in caplog.text
    scene.world.clock.advance(31)
    [record] = await scene.jobs.reap()
    assert record.state is JobState.QUEUED
