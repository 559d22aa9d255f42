"""Every operation of the OpenAPI document, called with data made from it, over real HTTP.

Nothing may fail on our side, and nothing may be answered that the document does not tell.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
import uvicorn
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance

from serve_app.dispatch.dispatcher import GenerationDispatcher
from serve_app.settings import OperationLimit, RateLimitSettings
from serve_app.stack.ports import any_free
from serve_app.testing import KEY, local_server
from storage.jobs_testing import JobsWorld

EXAMPLES = 6
UNLIMITED = OperationLimit(amount=1_000_000, concurrent=1000)


class Served(threading.Thread):
    """The application over in-memory objects and real records, with a dispatcher at work, on a port of loopback."""

    def __init__(self, world: JobsWorld) -> None:
        super().__init__(daemon=True)
        self.port = any_free()
        self.ready = threading.Event()
        self._world = world
        self._server: uvicorn.Server | None = None

    def run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        limits = RateLimitSettings(**dict.fromkeys(RateLimitSettings.model_fields.keys() - {"window_s"}, UNLIMITED))
        server = local_server(self._world.jobs, self._world.clock, rate_limits=limits)
        dispatcher = GenerationDispatcher(server.jobs, server.inference, owner="dispatcher", slots=4, poll_s=0.05)
        drawing = asyncio.create_task(dispatcher.run())
        config = uvicorn.Config(server.app, port=self.port, log_level="error", lifespan="on")
        self._server = uvicorn.Server(config)
        serving = asyncio.create_task(self._server.serve())
        while not self._server.started:  # noqa: ASYNC110 uvicorn has no event for it
            await asyncio.sleep(0.01)
        self.ready.set()
        await serving
        drawing.cancel()
        await asyncio.gather(drawing, return_exceptions=True)

    def stop(self) -> None:
        assert self._server is not None
        self._server.should_exit = True
        self.join(timeout=20)


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder: Path = tmp_path_factory.mktemp("records")
    world = JobsWorld(folder)
    served = Served(world)
    served.start()
    assert served.ready.wait(30)
    yield schemathesis.openapi.from_url(f"http://127.0.0.1:{served.port}/openapi.json")
    served.stop()
    world.close()


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["fitting", "unfitting"])
def test_every_answer_is_one_that_the_document_tells(
    described: Any, mode: GenerationMode, subtests: pytest.Subtests
) -> None:
    for found in described.get_all_operations():
        operation = found.ok()
        with subtests.test(operation.label):
            check(operation, mode)


def check(operation: Any, mode: GenerationMode) -> None:
    # What is well-formed may still name a data set that is not there; what RunPod's clients send is read leniently.
    excluded = [positive_data_acceptance]
    if operation.path.startswith("/v2/"):
        excluded.append(negative_data_rejection)

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    def call(case: Any) -> None:
        case.call_and_validate(headers={"Authorization": f"Bearer {KEY}"}, excluded_checks=excluded, timeout=30)

    try:
        call()
    except Unsatisfiable:
        # An operation that takes nothing has no unfitting request.
        assert mode is GenerationMode.NEGATIVE
