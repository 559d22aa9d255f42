"""The description of the interface, origins of browsers, readiness."""

import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from pydantic import SecretStr, ValidationError
from starlette.types import ASGIApp

from serve_app.collaborators import WorkerCounts
from serve_app.ingress.api import create_app
from serve_app.ingress.auth import KeyRing
from serve_app.ingress.middleware import proxy_middlewares
from serve_app.ingress.readiness import DiskSpace
from serve_app.settings import Settings
from serve_app.testing import LocalServer, local_server
from storage.errors import StorageUnavailable
from storage.jobs_testing import JobsWorld

ORIGIN = "https://studio.example.com"
PREFLIGHT = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,idempotency-key"}


async def described(server: LocalServer) -> dict[str, Any]:
    async with server.client(key=None) as http:
        reply = await http.get("/openapi.json")
    assert reply.status_code == 200
    document: dict[str, Any] = reply.json()
    return document


def references(part: Any) -> Iterator[str]:
    if isinstance(part, dict):
        if isinstance(part.get("$ref"), str):
            yield part["$ref"]
        for value in part.values():
            yield from references(value)
    elif isinstance(part, list):
        for value in part:
            yield from references(value)


async def test_every_reference_of_the_document_leads_somewhere(server: LocalServer) -> None:
    document = await described(server)
    named = {reference.removeprefix("#/components/schemas/") for reference in references(document)}
    assert named <= document["components"]["schemas"].keys()


async def test_every_operation_tells_its_errors_its_key_and_an_example_of_its_body(server: LocalServer) -> None:
    document = await described(server)
    schemas = document["components"]["schemas"]
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            if path == "/livez":
                continue
            assert operation["security"], path
            assert {"401", "429"} <= operation["responses"].keys(), path
            body = operation.get("requestBody")
            if body is not None:
                name = body["content"]["application/json"]["schema"]["$ref"].rsplit("/", 1)[-1]
                assert schemas[name]["examples"], name
            if method != "get" and path != "/readyz":
                assert "409" in operation["responses"], path


async def test_the_page_shows_every_operation_and_fetches_nothing(server: LocalServer) -> None:
    async with server.client(key=None) as http:
        page = await http.get("/docs")
    assert page.headers["content-security-policy"].startswith("default-src 'none'")
    document = await described(server)
    assert all(path in page.text for path in document["paths"])
    assert not re.search(r"(src|href)=\"?(https?:)?//", page.text)
    assert "<script" not in page.text


async def test_browsers_of_no_origin_may_read_replies_unless_one_is_named(server: LocalServer) -> None:
    async with server.client() as http:
        asked = await http.options("/v1/trainings", headers={"Origin": ORIGIN, **PREFLIGHT})
        reply = await http.get("/v1/trainings", headers={"Origin": ORIGIN})
    assert asked.status_code == 405
    assert not [name for name in (*asked.headers, *reply.headers) if name.startswith("access-control")]


async def test_browsers_of_a_named_origin_may_and_others_may_not(server: LocalServer) -> None:
    server.app = create_app(server.services, KeyRing({"matt": SecretStr("k")}), cors_origins=(ORIGIN,))
    async with server.client(key="k") as http:
        asked = await http.options("/v1/trainings", headers={"Origin": ORIGIN, **PREFLIGHT})
        assert (asked.status_code, asked.headers["access-control-allow-origin"]) == (200, ORIGIN)
        assert "access-control-allow-credentials" not in asked.headers
    async with server.client(key="wrong") as http:
        refused = await http.get("/v1/trainings", headers={"Origin": ORIGIN})
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, ORIGIN)


def behind_serves_proxy(app: ASGIApp) -> httpx.AsyncClient:
    for middleware in proxy_middlewares():
        app = middleware.cls(app)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


@pytest.mark.parametrize(
    ("origin", "method", "status", "code"),
    [
        (f"{ORIGIN}.evil", "POST", 403, "origin_not_allowed"),
        ("null", "POST", 403, "origin_not_allowed"),
        (ORIGIN, "PATCH", 400, "cors_method_not_allowed"),
    ],
)
async def test_a_refused_preflight_is_an_error_and_no_outage(
    server: LocalServer, origin: str, method: str, status: int, code: str
) -> None:
    app = create_app(server.services, KeyRing({"matt": SecretStr("k")}), cors_origins=(ORIGIN,))
    asked = {"Origin": origin, **PREFLIGHT, "Access-Control-Request-Method": method}
    async with behind_serves_proxy(app) as http:
        runpod = await http.options("/v2/ep/run", headers=asked)
        native = await http.options("/v1/trainings", headers=asked)
    assert (runpod.status_code, runpod.json()["error_type"]) == (status, code)
    assert (native.status_code, native.json()["code"]) == (status, code)
    for reply in (runpod, native):
        assert reply.headers["x-request-id"] == reply.json()["request_id"]
        assert "retry-after" not in reply.headers
        assert "Origin" in reply.headers["vary"]


async def test_pages_may_send_any_header(server: LocalServer) -> None:
    """OpenAI's client sends `x-stainless-os` and others from a browser."""
    app = create_app(server.services, KeyRing({"matt": SecretStr("k")}), cors_origins=(ORIGIN,))
    wanted = "authorization,content-type,x-stainless-os,x-stainless-retry-count"
    asked = {"Origin": ORIGIN, **PREFLIGHT, "Access-Control-Request-Headers": wanted}
    async with behind_serves_proxy(app) as http:
        reply = await http.options("/v1/images/generations", headers=asked)
    assert reply.status_code == 200
    assert reply.headers["access-control-allow-origin"] == ORIGIN
    assert reply.headers["access-control-allow-headers"] == wanted
    assert reply.headers["x-request-id"]


@pytest.mark.parametrize("origin", ["*", "null", "studio.example.com", "https://a.example/path", "https://*.example"])
def test_an_origin_that_is_not_one_is_no_setting(origin: str) -> None:
    with pytest.raises(ValidationError):
        Settings(cors_origins=(origin,))


async def test_another_method_is_told_which_ones_there_are(server: LocalServer) -> None:
    async with server.client() as http:
        reply = await http.put("/v1/trainings")
    assert (reply.status_code, reply.headers["allow"]) == (405, "GET, POST")


async def test_a_load_balancer_may_probe_with_head(server: LocalServer) -> None:
    async with server.client(key=None) as http:
        assert (await http.head("/livez")).status_code == 200
        assert (await http.head("/readyz")).status_code == 401
    async with server.client() as http:
        assert (await http.head("/readyz")).status_code == 200
        assert (await http.put("/livez")).headers["allow"] == "GET, HEAD"
        server.inference.healthy = False
        assert (await http.head("/readyz")).status_code == 503


async def test_readiness_names_each_part(server: LocalServer) -> None:
    async with server.client() as http:
        ready = (await http.get("/readyz")).json()
        assert (ready["ready"], set(ready["checks"])) == (True, {"storage", "jobs", "gpu", "replicas", "disk"})
        assert ready["checks"]["storage"]["breaker"] == "closed"
        assert ready["checks"]["disk"]["free_bytes"] > 0
        server.store.break_down(StorageUnavailable("get", 3.0))
        reply = await http.get("/readyz")
    assert (reply.status_code, reply.json()["checks"]["storage"]["error"]) == (503, "storage_unavailable")
    assert reply.json()["checks"]["jobs"]["ok"] is True


async def test_a_full_disk_is_not_ready(world: JobsWorld) -> None:
    server = local_server(world.jobs, world.clock)
    full = create_app(server.services, KeyRing({"matt": SecretStr("k")}), disk=lambda: DiskSpace(1, 100))
    server.app = full
    async with server.client(key="k") as http:
        reply = await http.get("/readyz")
    assert (reply.status_code, reply.json()["checks"]["disk"]["ok"]) == (503, False)


@pytest.mark.parametrize(("may_rest", "unhealthy", "ready"), [(False, 0, False), (True, 0, True), (True, 1, False)])
async def test_no_replica_is_ready_only_where_there_may_be_none(
    world: JobsWorld, may_rest: bool, unhealthy: int, ready: bool
) -> None:
    class Workers:
        async def counts(self) -> WorkerCounts:
            return WorkerCounts(unhealthy=unhealthy)

    server = local_server(world.jobs, world.clock, workers=Workers(), may_rest=may_rest)
    async with server.client() as http:
        assert (await http.get("/readyz")).json()["checks"]["replicas"]["ok"] is ready
