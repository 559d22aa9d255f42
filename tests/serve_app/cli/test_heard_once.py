"""What a command sends again, because the first answer was lost, is done once by the real application."""

import asyncio
from typing import Any

import httpx
import pytest

from serve_app.cli.client import ApiClient
from serve_app.cli.patience import Patience
from serve_app.testing import KEY, TENANT, LocalServer, train_config, upload_payload
from storage.job_state import JobKind
from storage.jobs_testing import JobsWorld


class LossyWay:
    """To the application in the test's event loop, from a thread; the answer to the first POST never arrives."""

    def __init__(self, server: LocalServer, world: JobsWorld) -> None:
        self._server = server
        self._world = world
        self._loop = asyncio.get_running_loop()
        self.posts: list[str] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        request.read()
        response = asyncio.run_coroutine_threadsafe(self._answered(request), self._loop).result()
        if request.method == "POST":
            self.posts.append(request.url.path)
            if len(self.posts) == 1:
                # Beyond what the server takes for an impatient client's same request.
                self._world.clock.advance(30)
                raise httpx.RemoteProtocolError("closed")
        return httpx.Response(
            response.status_code, content=response.content, headers={"Content-Type": "application/json"}
        )

    async def _answered(self, request: httpx.Request) -> httpx.Response:
        async with self._server.client(None) as http:
            return await http.request(
                request.method, request.url.raw_path.decode(), content=request.content, headers=request.headers
            )


async def through(way: LossyWay, call: str, *arguments: Any, **fields: Any) -> Any:
    patience = Patience(lambda _: None, sleep=lambda _: None)
    with ApiClient("http://test", KEY, patience=patience, transport=httpx.MockTransport(way)) as client:
        return await asyncio.to_thread(getattr(client, call), *arguments, **fields)


async def trainings(server: LocalServer) -> list[str]:
    page = await server.jobs.list(TENANT, kind=JobKind.TRAINING, limit=10)
    return [record.id for record in page.records]


@pytest.fixture
async def stored(server: LocalServer) -> LocalServer:
    async with server.client() as http:
        reply = await http.post("/v2/ep/runsync", json={"input": upload_payload("cats")})
        assert reply.json()["status"] == "COMPLETED"
    return server


async def test_a_training(stored: LocalServer, world: JobsWorld) -> None:
    way = LossyWay(stored, world)
    accepted = await through(way, "start", "train", config=train_config())
    assert way.posts == ["/v2/local/run"] * 2
    assert await trainings(stored) == [accepted["process_id"]]


async def test_an_upload(server: LocalServer, world: JobsWorld) -> None:
    way = LossyWay(server, world)
    fields = {name: value for name, value in upload_payload("cats").items() if name != "type"}
    reply = await through(way, "call", "upload_training_data", **fields)
    assert way.posts == ["/v2/local/runsync"] * 2
    manifests = [key for key in list(server.store.keys()) if key.endswith("manifest.json")]
    assert (len(manifests), reply["uploaded_count"]) == (1, 2)
