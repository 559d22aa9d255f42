"""The seam to Ray: what replicas raise, and what Ray itself raises."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from pydantic import SecretStr
from ray.exceptions import RayActorError, RayTaskError

from serve_app.app import build, inference_deployment
from serve_app.collaborators import DispatchLoad, WorkerCounts
from serve_app.errors import InvalidRequest, ServiceUnavailable
from serve_app.handles import HandleInference, RestingInference, answer, worker_counts
from serve_app.inference.plan import GenerationRequest, GenerationWork
from serve_app.settings import AutoscalingSettings, Settings, SettingsIncomplete
from serve_app.testing import ScriptedInference
from storage.errors import StorageUnavailable
from storage.testing import InMemoryStore
from train_jobs.errors import Problem
from train_jobs.generate_spec import GenerateSpec


class Response:
    def __init__(self, result: Any = None, error: BaseException | None = None, events: int = 0) -> None:
        self.result, self.error, self.events = result, error, events
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True

    def __await__(self) -> Any:
        return self._wait().__await__()

    async def _wait(self) -> Any:
        if self.error is not None:
            raise self.error
        return self.result

    async def __aiter__(self) -> AsyncIterator[Any]:
        for step in range(self.events):
            yield {"progress": {"step": step}}
        if self.error is not None:
            raise self.error


class Streaming:
    def __init__(self, response: Response) -> None:
        self.response = response
        self.generate = self

    def options(self, *, stream: bool) -> "Streaming":
        assert stream
        return self

    def remote(self, work: GenerationWork) -> Response:
        return self.response


def wrapped(cause: Exception) -> BaseException:
    error: BaseException = RayTaskError("f", "a traceback with http://secret", cause).as_instanceof_cause()
    return error


@pytest.mark.parametrize(
    "cause", [InvalidRequest([Problem("a", "b", "c")]), StorageUnavailable("get", 3.0), TimeoutError("x")]
)
async def test_a_replicas_own_error_comes_out_as_it_was_raised(cause: Exception) -> None:
    with pytest.raises(type(cause)) as raised:
        await answer("validation", Response(error=wrapped(cause)), 5)
    assert type(raised.value) is type(cause)
    assert "secret" not in str(raised.value)


async def test_a_dead_replica_is_a_service_that_did_not_answer() -> None:
    with pytest.raises(ServiceUnavailable):
        await answer("validation", Response(error=RayActorError()), 5)


async def test_a_late_answer_is_given_up_and_cancelled() -> None:
    class Never(Response):
        async def _wait(self) -> Any:
            await asyncio.Event().wait()

    response = Never()
    with pytest.raises(ServiceUnavailable):
        await answer("validation", response, 0.0)
    assert response.cancelled


async def test_a_stream_passes_events_on_and_maps_errors() -> None:
    response = Response(events=2, error=wrapped(StorageUnavailable("get", 3.0)))
    events = HandleInference(Streaming(response)).generate(GenerationWork("gen_1", "t", {}))
    assert [await anext(events), await anext(events)] == [{"progress": {"step": 0}}, {"progress": {"step": 1}}]
    with pytest.raises(StorageUnavailable):
        await anext(events)


async def test_leaving_a_stream_early_stops_the_replica() -> None:
    response = Response(events=2)
    events = HandleInference(Streaming(response)).generate(GenerationWork("gen_1", "t", {}))
    await anext(events)
    await events.aclose()
    assert response.cancelled


@pytest.mark.parametrize(
    ("states", "running", "expected"),
    [
        ({}, 0, WorkerCounts()),
        ({"ReplicaState.RUNNING": 2, "STARTING": 1}, 1, WorkerCounts(idle=1, initializing=1, ready=2, running=1)),
        ({"RUNNING": 1, "STOPPING": 1, "UNHEALTHY": 1}, 5, WorkerCounts(ready=1, running=1, unhealthy=1)),
    ],
)
def test_workers_are_counted_from_replicas_and_work(
    states: dict[str, int], running: int, expected: WorkerCounts
) -> None:
    assert worker_counts(states, DispatchLoad(running=running, slots=2)) == expected


def test_a_graph_without_a_key_or_storage_is_refused_before_it_starts() -> None:
    with pytest.raises(SettingsIncomplete):
        build(Settings())
    with pytest.raises(SettingsIncomplete):
        build(Settings(api_key=SecretStr("k")))


def test_the_graph_is_bound_without_a_cluster() -> None:
    settings = Settings(api_key=SecretStr("k"), s3_access_key_id=SecretStr("i"), s3_secret_access_key=SecretStr("s"))
    assert build(settings) is not None


class Counted:
    def __init__(self, **counts: int) -> None:
        self._counts = WorkerCounts(**counts)

    async def counts(self) -> WorkerCounts:
        return self._counts


async def test_replicas_that_may_be_none_are_asked_for_their_health_only_while_they_work() -> None:
    replicas = ScriptedInference(InMemoryStore(), healthy=False)
    for counts in ({}, {"ready": 1, "idle": 1}, {"initializing": 1}):
        health = await RestingInference(replicas, Counted(**counts)).health()
        assert (health.ok, health.device) == (True, "none")
    assert not (await RestingInference(replicas, Counted(unhealthy=1)).health()).ok
    assert (await RestingInference(replicas, Counted(ready=1, running=1)).health()).device == "cpu"


async def test_replicas_that_may_be_none_make_pictures_like_any() -> None:
    request = GenerationRequest(spec=GenerateSpec(prompts=("a",), model="tiny", seed=1)).as_json()
    replicas = RestingInference(ScriptedInference(InMemoryStore()), Counted())
    events = [event async for event in replicas.generate(GenerationWork("gen_1", "matt", request))]
    assert "output" in events[-1]


def test_replicas_scale_with_the_generations_that_a_batch_has_no_place_for() -> None:
    scaling = AutoscalingSettings(replicas_min=0, replicas_max=3, grow_after_s=1, shrink_after_s=2)
    deployment = inference_deployment(Settings(autoscaling=scaling, pictures_per_batch=4))
    config = deployment._deployment_config.autoscaling_config
    assert (config.min_replicas, config.max_replicas, config.get_target_ongoing_requests()) == (0, 3, 4)
    assert (config.upscale_delay_s, config.downscale_delay_s) == (1, 2)
    fixed = inference_deployment(Settings(inference_replicas=2))._deployment_config
    assert (fixed.autoscaling_config, fixed.num_replicas) == (None, 2)
