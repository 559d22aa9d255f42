"""The seam to Ray: what replicas raise, and what Ray itself raises."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from pydantic import SecretStr
from ray.exceptions import RayActorError, RayTaskError

from serve_app.app import build
from serve_app.collaborators import DispatchLoad, WorkerCounts
from serve_app.errors import InvalidRequest, ServiceUnavailable
from serve_app.handles import HandleInference, answer, worker_counts
from serve_app.inference.plan import GenerationWork
from serve_app.settings import Settings, SettingsIncomplete
from storage.errors import StorageUnavailable
from train_jobs.errors import Problem


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
