"""What the door tells of its requests: whose, where, how they ended; never a key, a query or a path as it came."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import pytest
from starlette.types import ASGIApp, Receive, Scope, Send

from serve_app.ingress.door import Door, WhileWanted
from serve_app.ingress.request_log import (
    SLICE,
    UNROUTED,
    Ended,
    Labels,
    LineFile,
    Logged,
    RayMetrics,
    RequestLog,
    RouteTemplates,
)
from serve_app.testing import KEY, TENANT, LocalServer

NOTHING = {"input": {"type": "process_status", "process_id": "secret-process"}}
STATUS, RUNSYNC = "/v2/{endpoint_id}/status/{job_id}", "/v2/{endpoint_id}/runsync"


class Told:
    """`Metrics` that remember."""

    def __init__(self) -> None:
        self.counted: Counter[Labels] = Counter()
        self.observed: list[tuple[Labels, float]] = []
        self.in_flight: list[int] = []

    def count(self, labels: Labels, requests: int) -> None:
        self.counted[labels] += requests

    def observe(self, labels: Labels, latency_ms: float) -> None:
        self.observed.append((labels, latency_ms))

    def show_in_flight(self, requests: int) -> None:
        self.in_flight.append(requests)


class Scene:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.told = Told()
        self.log = RequestLog(LineFile(folder / "logs" / "access.log"), self.told)

    def text(self) -> str:
        return (self.folder / "logs" / "access.log").read_text()

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.text().splitlines()]

    @asynccontextmanager
    async def door(self, app: ASGIApp, server: LocalServer, *, places: int = 8) -> AsyncIterator[httpx.AsyncClient]:
        door = Door(self.folder / "a.door", places=places, drain_s=1, log=self.log)
        await door.open(app, server.app.routes)
        transport = httpx.AsyncHTTPTransport(uds=str(self.folder / "a.door"))
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=10) as http:
            yield http
        await door.close()


@pytest.fixture
def scene() -> Iterator[Scene]:
    with TemporaryDirectory(prefix="rl", dir="/tmp") as name:
        yield Scene(Path(name))


async def test_each_request_is_one_line_with_its_route_and_tenant(server: LocalServer, scene: Scene) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    async with scene.door(server.app, server) as http:
        made = await http.post("/v2/ep/runsync?wait=5000", json=NOTHING, headers=headers)
        await http.get(f"/v2//ep/status/{made.json()['id']}", headers={**headers, "X-Request-ID": "abc"})
        await http.get("/v2/ep/status/secret-id?api_key=secret-query", headers=headers)
        await http.get("/v2/ep/status/secret-id", headers={"Authorization": "Bearer secret-key"})
        await http.get("/secret-place")
        await http.request("TRACE", "/livez")
    told = [(line["method"], line["route"], line["status"], line["tenant"]) for line in scene.lines()]
    assert told == [
        ("POST", RUNSYNC, 200, TENANT),
        ("GET", STATUS, 200, TENANT),
        ("GET", STATUS, 404, TENANT),
        ("GET", STATUS, 401, None),
        ("GET", UNROUTED, 401, None),
        ("OTHER", "/livez", 405, None),
    ]
    assert scene.lines()[0]["request_id"] == made.headers["x-request-id"]
    assert scene.lines()[1]["request_id"] == "abc"
    assert all(line["latency_ms"] > 0 and line["time"].endswith("+00:00") for line in scene.lines())
    assert "secret" not in scene.text().lower()
    assert KEY not in scene.text()


async def test_metrics_count_and_time_what_the_lines_tell(server: LocalServer, scene: Scene) -> None:
    async with scene.door(server.app, server) as http:
        for _ in range(SLICE + 1):
            await http.get("/livez")
        await http.get("/v2/ep/health")
    assert scene.told.counted == {
        ("GET", "/livez", "2xx"): SLICE + 1,
        ("GET", "/v2/{endpoint_id}/health", "4xx"): 1,
    }
    assert [value for _, value in scene.told.observed] == pytest.approx(
        [line["latency_ms"] for line in scene.lines()], abs=0.001
    )
    assert len(scene.lines()) == SLICE + 2


async def test_the_requests_under_way_are_shown_and_a_refused_one_is_told(server: LocalServer, scene: Scene) -> None:
    begun, may_end = asyncio.Event(), asyncio.Event()

    async def slow(_: Scope, __: Receive, send: Send) -> None:
        begun.set()
        await may_end.wait()
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async with scene.door(slow, server, places=1) as http, asyncio.TaskGroup() as group:
        group.create_task(http.get("/livez"))
        await begun.wait()
        await scene.log.flush()
        assert scene.told.in_flight == [1]
        assert (await http.get("/v2/ep/health")).status_code == 503
        may_end.set()
    assert scene.told.in_flight == [1, 0]
    assert [line["status"] for line in scene.lines()] == [503, 204]


async def _over(app: ASGIApp, scene: Scene) -> None:
    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def send(_: Any) -> None:
        return

    logged = Logged(app, scene.log, RouteTemplates([]))
    await logged({"type": "http", "method": "GET", "path": "/x"}, receive, send)


async def test_a_client_that_went_away_is_told_as_gone(scene: Scene) -> None:
    async def waits(*_: object) -> None:
        await asyncio.Event().wait()

    await _over(WhileWanted(waits, patience_s=0), scene)
    await scene.log.close()
    assert [line["status"] for line in scene.lines()] == [499]


async def test_what_the_server_answers_for_the_application_is_told_as_500(scene: Scene) -> None:
    async def fails(*_: object) -> None:
        raise ValueError("https://secret")

    with pytest.raises(ValueError, match="secret"):
        await _over(fails, scene)
    await scene.log.close()
    assert [line["status"] for line in scene.lines()] == [500]
    assert "secret" not in scene.text()


def test_every_route_of_the_interface_has_its_template(server: LocalServer) -> None:
    templates = RouteTemplates(server.app.routes)
    described = server.app.openapi()["paths"]
    found = {path: templates.of(path.replace("{", "").replace("}", "")) for path in described}
    assert {path: template for path, template in found.items() if template != path} == {}
    assert len(described) > 30
    assert templates.of("/v2/ep/nothing") == UNROUTED


def test_ray_takes_every_metric() -> None:
    """Ray's metrics take values without a cluster; they go nowhere then."""
    metrics = RayMetrics("replica")
    labels = ("GET", "/livez", Ended(0.0, "GET", "/livez", 200, 1.0, "", None).status_class)
    metrics.count(labels, 2)
    metrics.observe(labels, 0.5)
    metrics.show_in_flight(0)


async def test_a_replica_that_was_never_caught_busy_is_told_of_as_idle(scene: Scene) -> None:
    await scene.log.flush()
    await scene.log.flush()
    assert scene.told.in_flight == [0]
