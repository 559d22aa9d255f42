import pytest
from pydantic import SecretStr
from starlette.routing import BaseRoute

from serve_app.errors import Unauthorized
from serve_app.ingress.auth import KeyRing
from serve_app.testing import LocalServer

RING = KeyRing({"matt": SecretStr("abc"), "matt2": SecretStr("def")})


@pytest.mark.parametrize("header", ["Bearer abc", "bearer abc", "abc", "  Bearer   abc  "])
async def test_a_key_is_taken_bare_or_as_bearer(header: str) -> None:
    assert (await RING.principal(header)).tenant == "matt"


async def test_each_key_speaks_for_its_tenant() -> None:
    assert (await RING.principal("Bearer def")).tenant == "matt2"


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer ", "ab", "abcd", "Basic abc", "Bearer abc def", "x" * 9999]
)
async def test_anything_else_is_refused(header: str | None) -> None:
    with pytest.raises(Unauthorized):
        await RING.principal(header)


def paths_and_methods(routes: list[BaseRoute]) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for route in routes:
        nested = getattr(route, "routes", None)
        if nested:
            found += paths_and_methods(nested)
            continue
        path = getattr(route, "path", None)
        if path is not None:
            found += [(path, method) for method in sorted(getattr(route, "methods", None) or {"GET"})]
    return found


async def test_every_route_but_livez_needs_a_key(server: LocalServer) -> None:
    schema = server.app.openapi()["paths"]
    routes = [(path, method.upper()) for path, methods in schema.items() for method in methods]
    routes += paths_and_methods(server.app.routes)
    assert {"/livez", "/readyz", "/v2/{endpoint_id}/run", "/v2/{endpoint_id}/health"} <= {path for path, _ in routes}
    async with server.client(key=None) as http:
        for path, method in routes:
            url = path.replace("{endpoint_id}", "ep").replace("{job_id}", "x")
            reply = await http.request(method, url)
            expected = 200 if path == "/livez" else 401
            assert reply.status_code == expected, (method, path)


async def test_a_refusal_is_json_and_names_the_scheme(server: LocalServer) -> None:
    async with server.client(key="wrong") as http:
        reply = await http.post("/v2/ep/run", json={"input": {}})
    assert reply.status_code == 401
    assert reply.headers["www-authenticate"] == "Bearer"
    assert reply.json()["error_type"] == "unauthorized"


async def test_an_unknown_path_is_not_told_apart_without_a_key(server: LocalServer) -> None:
    async with server.client(key=None) as http:
        assert (await http.get("/nothing")).status_code == 401


async def test_a_stranger_is_refused_before_the_body_is_looked_at(server: LocalServer) -> None:
    async with server.client(key=None) as http:
        reply = await http.post("/v2/ep/run", content=b"x" * (11 * 1024 * 1024))
    assert reply.status_code == 401


async def test_livez_touches_nothing(server: LocalServer) -> None:
    async with server.client(key=None) as http:
        assert (await http.get("/livez")).json() == {"alive": True}
    assert not server.store.calls
