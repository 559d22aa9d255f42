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


# What a schema cannot say, by the code of the refusal.
STATEFUL = {
    "lora_not_usable": "an adapter that is named must be there",
    "model_not_served": "a model that is named must be one of this server's",
    "invalid_cursor": "a cursor comes from the page before",
    "idempotency_conflict": "the same Idempotency-Key may have come with another request before",
}
# Fields that must hold a picture, or a URL that leads to one.
PICTURES = frozenset({"init_image", "mask"})
# Operations whose bodies must hold more than a schema can say.
BEYOND_SCHEMAS = {
    "POST /v1/datasets": "the files must be pictures, and no two names the same once they are composed",
    "POST /v1/trainings": "a configuration is YAML text, and a spec's fields must fit each other",
    "POST /v1/uploads": "no two names may be the same once composed, and all sizes together are under a limit",
}


def is_excused(operation: Any, reply: Any) -> bool:
    """Whether a request that fits the document may have been refused with this reply."""
    if operation.label in BEYOND_SCHEMAS:
        return True
    if "json" not in reply.headers.get("content-type", [""])[0]:
        return False
    body = reply.json()
    error = body.get("error")
    codes = [body.get("code"), body.get("error_type"), error.get("code") if isinstance(error, dict) else None]
    wrong = {problem["path"] for problem in body.get("validation_errors", [])}
    return any(code in STATEFUL for code in codes) or (bool(wrong) and wrong <= PICTURES)


def check(operation: Any, mode: GenerationMode) -> None:
    # What RunPod's clients send is read leniently.
    excluded = [negative_data_rejection] if operation.path.startswith("/v2/") else []

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        database=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    def call(case: Any) -> None:
        reply = case.call(headers={"Authorization": f"Bearer {KEY}"}, timeout=30)
        left_out = [*excluded, positive_data_acceptance] if is_excused(operation, reply) else excluded
        case.validate_response(reply, excluded_checks=left_out, headers={"Authorization": f"Bearer {KEY}"})

    try:
        call()
    except Unsatisfiable:
        # An operation that takes nothing has no unfitting request.
        assert mode is GenerationMode.NEGATIVE
