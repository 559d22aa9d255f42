"""Job types asked through /runsync, as clients do."""

from typing import Any

from serve_app.testing import LocalServer
from storage.counters import CLEANUP_FAILURES
from storage.ray_counters import of_this_process


async def ask(server: LocalServer, payload: dict[str, Any], key: str | None = None) -> dict[str, Any]:
    async with server.client(**({} if key is None else {"key": key})) as http:
        reply = await http.post("/v2/ep/runsync", json={"input": payload})
    assert reply.status_code == 200, reply.text
    body: dict[str, Any] = reply.json()
    return body


async def done(server: LocalServer, payload: dict[str, Any], key: str | None = None) -> dict[str, Any]:
    reply = await ask(server, payload, key)
    assert reply["status"] == "COMPLETED", reply
    output: dict[str, Any] = reply["output"]
    return output


async def refused(server: LocalServer, payload: dict[str, Any], key: str | None = None) -> dict[str, Any]:
    reply = await ask(server, payload, key)
    assert reply["status"] == "FAILED", reply
    assert reply["error"] == reply["output"]["error"]
    output: dict[str, Any] = reply["output"]
    return output


def cleanup_failures() -> dict[str, float]:
    """How many so far, by the kind of thing."""
    return of_this_process().counts().get(CLEANUP_FAILURES, {})
