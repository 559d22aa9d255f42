"""Request ids, refused headers, slashes, sizes, errors of the router."""

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
from ray.serve._private.http_util import _apply_middlewares
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.ingress.middleware import EdgeHeaders, ProxyErrors, proxy_middlewares
from serve_app.settings import RequestLimits
from serve_app.testing import KEY, LocalServer, local_server
from storage.jobs_testing import JobsWorld

HEALTH = {"input": {"type": "health"}}


async def test_a_clients_request_id_comes_back(server: LocalServer) -> None:
    async with server.client() as http:
        reply = await http.post("/v2/ep/runsync", json=HEALTH, headers={"X-Request-ID": "abc-1.2:3_4"})
    assert reply.headers.get_list("x-request-id") == ["abc-1.2:3_4"]
    assert reply.json()["output"]["request_id"] == "abc-1.2:3_4"


@pytest.mark.parametrize("offered", ["", "a b", "x" * 129, "<script>", "a\tb"])
async def test_an_unfit_request_id_is_replaced(server: LocalServer, offered: str) -> None:
    async with server.client() as http:
        given = (await http.get("/livez", headers={"X-Request-ID": offered})).headers["x-request-id"]
    assert given != offered
    assert len(given) == 32


async def test_errors_carry_the_request_id(server: LocalServer) -> None:
    async with server.client() as http:
        reply = await http.get("/v2/ep/status/unknown", headers={"X-Request-ID": "abc"})
    assert reply.json()["request_id"] == "abc"
    assert reply.headers["x-request-id"] == "abc"


@pytest.mark.parametrize("path", ["//livez", "//v2//ep///health", "/v2/ep//health"])
async def test_repeated_slashes_are_one(server: LocalServer, path: str) -> None:
    async with server.client() as http:
        request = http.build_request("GET", "http://test/")
        request.url = request.url.copy_with(raw_path=path.encode())
        assert (await http.send(request)).status_code == 200


async def seen_by(app_headers: list[tuple[bytes, bytes]]) -> dict[str, Any]:
    seen: dict[str, Any] = {}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.update(scope)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x-request-id", b"other")]})

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "path": "/", "headers": app_headers}
    await EdgeHeaders(app, new_id=lambda: "made")(scope, None, send)  # type: ignore[arg-type]
    seen["sent"] = sent
    return seen


async def test_headers_that_only_the_server_may_set_are_dropped() -> None:
    refused = [(b"x-request-timeout-seconds", b"0"), (b"X-Request-Disconnect-Disabled", b"?1")]
    seen = await seen_by([*refused, (b"a", b"b")])
    assert seen["headers"] == [(b"a", b"b"), (b"x-request-id", b"made")]


async def test_a_reply_has_one_request_id_whoever_else_set_it() -> None:
    seen = await seen_by([(b"x-request-id", b"mine")])
    assert seen["sent"][0]["headers"] == [(b"x-request-id", b"mine")]


async def test_a_trace_parent_comes_back_when_it_is_one(server: LocalServer) -> None:
    trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    async with server.client() as http:
        assert (await http.get("/livez", headers={"traceparent": trace})).headers["traceparent"] == trace
        assert "traceparent" not in (await http.get("/livez", headers={"traceparent": "x"})).headers


def test_the_proxy_gets_the_same_edge() -> None:
    assert [middleware.cls for middleware in proxy_middlewares()] == [ProxyErrors, EdgeHeaders]


def proxy_that_sends(*messages: Message) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for message in messages:
            await send(message)

    # In the order in which Serve itself puts them around its proxy.
    wrapped: ASGIApp = _apply_middlewares(app, proxy_middlewares())
    return wrapped


def sent(status: int, content_type: bytes, body: bytes) -> list[Message]:
    headers = [[b"content-type", content_type]]
    return [
        {"type": "http.response.start", "status": status, "headers": headers},
        {"type": "http.response.body", "body": body},
    ]


@pytest.mark.parametrize(
    "messages", [[], sent(503, b"text/plain; charset=utf-8", b"ActorDiedError: pid 7 on 10.0.0.1")]
)
async def test_a_lost_replica_is_a_json_error_without_what_the_proxy_says(messages: list[Message]) -> None:
    transport = httpx.ASGITransport(app=proxy_that_sends(*messages))
    async with httpx.AsyncClient(transport=transport, base_url="http://raylora") as http:
        reply = await http.get("/v2/ep/status/x")
        assert (reply.status_code, reply.json()["error_type"]) == (503, "service_unavailable")
        assert reply.headers["x-request-id"] == reply.json()["request_id"]
        assert "ActorDied" not in reply.text
        problem = await http.get("/v1/trainings")
        assert problem.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize("messages", [sent(404, b"application/json", b"{}"), sent(200, b"text/plain", b"success")])
async def test_what_the_application_answers_passes_the_proxy(messages: list[Message]) -> None:
    transport = httpx.ASGITransport(app=proxy_that_sends(*messages))
    async with httpx.AsyncClient(transport=transport, base_url="http://raylora") as http:
        reply = await http.get("/v2/ep/status/x")
    assert (reply.status_code, reply.content) == (messages[0]["status"], messages[1]["body"])


async def chunks(size_bytes: int) -> AsyncIterator[bytes]:
    for _ in range(size_bytes // 100):
        yield b"x" * 100


@pytest.mark.parametrize(("operation", "limit_bytes"), [("run", 1000), ("runsync", 2000)])
async def test_a_body_over_the_limit_is_413_and_names_the_way_out(
    world: JobsWorld, operation: str, limit_bytes: int
) -> None:
    limits = RequestLimits(run_body_bytes_max=1000, runsync_body_bytes_max=2000)
    server = local_server(world.jobs, world.clock, limits)
    padding = limit_bytes - len(json.dumps({**HEALTH, "p": ""}))
    async with server.client() as http:
        fits = json.dumps({**HEALTH, "p": "x" * padding}).encode()
        assert len(fits) == limit_bytes
        assert (await http.post(f"/v2/ep/{operation}", content=fits)).status_code == 200
        declared = await http.post(f"/v2/ep/{operation}", content=b"x" * (limit_bytes + 1))
        streamed = await http.post(f"/v2/ep/{operation}", content=chunks(limit_bytes + 100))
    for reply in (declared, streamed):
        assert reply.status_code == 413
        assert "presigned upload" in reply.json()["error"]


@pytest.mark.parametrize(
    ("path", "way_out"),
    [
        ("/v2/ep/run", "(create_upload)"),
        ("/v1/datasets", "(POST /v1/uploads)"),
        ("/v1/images/generations", "(POST /v1/uploads)"),
        ("/v1/hf/tiny", "(POST /v1/uploads)"),
    ],
)
async def test_a_body_over_the_limit_is_told_the_way_out_of_its_surface(
    world: JobsWorld, path: str, way_out: str
) -> None:
    limits = RequestLimits(run_body_bytes_max=10, runsync_body_bytes_max=10, other_body_bytes_max=10)
    async with local_server(world.jobs, world.clock, limits).client() as http:
        reply = await http.post(path, content=b"x" * 11)
    assert (reply.status_code, way_out in reply.text) == (413, True)


def test_the_limits_are_runpods() -> None:
    limits = RequestLimits()
    assert (limits.run_body_bytes_max, limits.runsync_body_bytes_max) == (10 * 2**20, 20 * 2**20)


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/nothing", 404), ("GET", "/v2/ep/run", 405)])
async def test_what_the_router_refuses_is_json_too(server: LocalServer, method: str, path: str, status: int) -> None:
    async with server.client() as http:
        reply = await http.request(method, path)
    assert reply.status_code == status
    assert "json" in reply.headers["content-type"]
    assert "status" not in reply.json()


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("HEAD", "/v2/ep/status/x", 405),
        ("DELETE", "/v2/ep/runsync", 405),
        ("GET", "/v2/ep/runsync", 405),
        ("POST", "/v2//run", 404),
        ("POST", "/v2/ep/run/", 404),
        ("GET", "/v2/ep/status", 404),
        ("GET", "/v2/ep/status/", 404),
        ("GET", "/v2/ep/status/a/b", 404),
        ("POST", "/v3/ep/run", 404),
    ],
)
async def test_what_is_nearly_an_often_made_call_is_not_taken_for_one(
    server: LocalServer, method: str, path: str, status: int
) -> None:
    async with server.client() as http:
        reply = await http.request(method, path)
    assert reply.status_code == status
    if status == 405:
        assert reply.headers["allow"] == ("GET, POST" if "/status/" in path else "POST")


@pytest.mark.parametrize("call", ["run", "runsync", "runsync?wait=2000"])
async def test_the_often_made_calls_are_answered_below_another_path_too(server: LocalServer, call: str) -> None:
    async with server.client() as http:
        here = await http.post(f"/v2/ep/{call}", json={"input": {"type": "health"}})
    mounted = Starlette(routes=[Mount("/sub", app=server.app)])
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(mounted), base_url="http://test/sub", headers={"Authorization": f"Bearer {KEY}"}
    ) as http:
        there = await http.post(f"/v2/ep/{call}", json={"input": {"type": "health"}})
    assert (there.status_code, there.json().keys()) == (here.status_code, here.json().keys())


async def test_a_client_that_goes_away_within_its_body_is_no_fault_of_the_server(
    server: LocalServer, caplog: pytest.LogCaptureFixture
) -> None:
    messages: Iterator[Message] = iter(
        [{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}]
    )

    async def receive() -> Message:
        return next(messages)

    async def send(_: Message) -> None:
        return

    scope = {"type": "http", "method": "POST", "path": "/v2/ep/runsync", "query_string": b"", "root_path": ""}
    scope |= {"headers": [(b"authorization", KEY.encode())]}
    await server.app(scope, receive, send)
    assert [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")] == []


async def test_a_body_may_come_in_parts(server: LocalServer) -> None:
    async def parts(*found: bytes) -> AsyncIterator[bytes]:
        for part in found:
            yield part

    async with server.client() as http:
        reply = await http.post("/v2/ep/runsync", content=parts(b'{"input": ', b'{"type": "health"}', b"}"))
    assert (reply.status_code, reply.json()["status"]) == (200, "COMPLETED")


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b'"x"', b'{"input": NaN}', b'{"input": {"prompt": "\\ud800"}}', b"\xff\xfe", b"[" * 100_000],
)
async def test_a_body_that_is_no_json_object_is_400(server: LocalServer, body: bytes) -> None:
    async with server.client() as http:
        reply = await http.post("/v2/ep/run", content=body)
    assert reply.status_code == 400
    assert reply.json()["error_type"] == "body_invalid"


@pytest.mark.parametrize(
    ("body", "path"),
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": {}, "policy": {"executionTimeout": 4999}}, "policy.executionTimeout"),
        ({"input": {}, "policy": {"ttl": 7 * 24 * 3600 * 1000 + 1}}, "policy.ttl"),
        ({"input": {}, "webhook": "http://example.com"}, "webhook"),
        ({"input": {}, "webhook": "https://127.0.0.1/"}, "webhook"),
        ({"input": {}, "webhook": "https://a..b/hook"}, "webhook"),
        ({"input": {}, "webhook": f"https://{'a' * 64}.example.com/"}, "webhook"),
        ({"input": {}, "s3Config": "a bucket"}, "s3Config"),
    ],
)
async def test_an_envelope_that_cannot_be_honoured_is_refused_by_name(
    server: LocalServer, body: dict[str, Any], path: str
) -> None:
    async with server.client() as http:
        reply = await http.post("/v2/ep/run", json=body)
    assert reply.status_code == 400
    assert [problem["path"] for problem in reply.json()["validation_errors"]] == [path]


async def test_an_unexpected_failure_is_a_500_without_its_text(server: LocalServer, caplog: Any) -> None:
    async def broken(tenant: str | None = None, *, kind: Any = None) -> Any:
        raise RuntimeError("http://secret?X-Amz-Signature=1")

    server.jobs.counts = broken  # type: ignore[method-assign]
    async with server.client() as http:
        reply = await http.get("/v2/ep/health")
    assert reply.status_code == 500
    assert reply.json()["error_type"] == "internal_error"
    assert "secret" not in reply.text + caplog.text
    assert "RuntimeError" in caplog.text


async def test_no_cors_headers_are_sent(server: LocalServer) -> None:
    async with server.client() as http:
        reply = await http.get("/livez", headers={"Origin": "https://example.com"})
    assert not [name for name in reply.headers if name.startswith("access-control")]
