"""Idempotency-Key on RunPod's operations: for a day the same request gets the reply of the first one, not a 404."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve_app.testing import LocalServer, local_server, upload_payload
from storage.job_state import JobKind
from storage.jobs import JobsPolicy
from storage.jobs_testing import JobsWorld

OWNER = "dispatcher-1"
DAY_S = 24 * 3600
KEY = {"Idempotency-Key": "k"}
UPLOAD = {"input": upload_payload()}
PROMPT = {"input": {"prompt": "a red circle"}}
DOWNLOAD = {"input": {"type": "list_models"}}


@pytest.fixture
def world(tmp_path: Path) -> Iterator[JobsWorld]:
    world = JobsWorld(tmp_path, JobsPolicy(idempotency_ttl_s=DAY_S))
    yield world
    world.close()


async def send(http: httpx.AsyncClient, call: str, body: dict[str, Any]) -> dict[str, Any]:
    reply = await http.post(f"/v2/ep/{call}", json=body, headers=KEY)
    assert reply.status_code == 200, reply.text
    answer: dict[str, Any] = reply.json()
    return answer


async def status_code(http: httpx.AsyncClient, job_id: str) -> int:
    return (await http.get(f"/v2/ep/status/{job_id}")).status_code


@pytest.mark.parametrize("body", [UPLOAD, {"input": {"type": "delete_results", "result_type": "images"}}])
async def test_what_was_done_once_is_told_again_for_a_day_and_not_done_again(
    server: LocalServer, world: JobsWorld, body: dict[str, Any]
) -> None:
    async with server.client() as http:
        first = await send(http, "runsync", body)
        stored = server.store.keys()
        for wait_s in (61, 1800, DAY_S - 1900):
            world.clock.advance(wait_s)
            assert await send(http, "runsync", body) == first
        assert server.store.keys() == stored
        world.clock.advance(100)
        assert (await send(http, "runsync", body))["id"] != first["id"]


async def test_the_id_that_a_key_brings_again_is_one_that_is_known(server: LocalServer, world: JobsWorld) -> None:
    async with server.client() as http:
        job_id = (await send(http, "run", UPLOAD))["id"]
        await http.post(f"/v2/ep/status-sync/{job_id}")
        world.clock.advance(DAY_S - 10)
        assert (await send(http, "run", UPLOAD))["id"] == job_id
        assert (await http.get(f"/v2/ep/status/{job_id}")).json()["status"] == "COMPLETED"


async def test_a_failure_is_told_again_and_its_retry_after_it(server: LocalServer, world: JobsWorld) -> None:
    body = {"input": {**upload_payload(), "training_name": "no/name"}}
    async with server.client() as http:
        first = await send(http, "runsync", body)
        assert first["status"] == "FAILED"
        world.clock.advance(3600)
        assert await send(http, "runsync", body) == first
        await http.post(f"/v2/ep/retry/{first['id']}")
        await http.post(f"/v2/ep/status-sync/{first['id']}")
        world.clock.advance(DAY_S - 3700)
        again = await send(http, "runsync", body)
    assert (again["id"], again["status"], again["retries"]) == (first["id"], "FAILED", 1)


async def test_what_only_reads_is_read_again_once_its_reply_is_gone(server: LocalServer, world: JobsWorld) -> None:
    async with server.client() as http:
        first = await send(http, "runsync", DOWNLOAD)
        world.clock.advance(59)
        assert await send(http, "runsync", DOWNLOAD) == first
        world.clock.advance(1)
        again = await send(http, "runsync", DOWNLOAD)
        assert (again["id"] != first["id"], again["status"]) == (True, "COMPLETED")
        assert await send(http, "runsync", DOWNLOAD) == again


@pytest.mark.parametrize("call", ["run", "runsync?wait=1000"])
async def test_a_generations_result_is_kept_as_long_as_its_key(
    server: LocalServer, world: JobsWorld, call: str
) -> None:
    async with server.client() as http:
        job_id = (await send(http, call, PROMPT))["id"]
        [record] = await server.jobs.claim(JobKind.GENERATION, OWNER)
        await server.jobs.start(record.id, OWNER)
        await server.jobs.complete(record.id, OWNER, {"images": []})
        world.clock.advance(DAY_S - 1)
        again = await send(http, call, PROMPT)
        assert (again["id"], await status_code(http, job_id)) == (job_id, 200)
        world.clock.advance(2)
        assert await status_code(http, job_id) == 404
    assert sum((await server.jobs.counts()).values()) == 1


async def test_a_result_without_a_key_is_kept_no_longer_than_before(server: LocalServer, world: JobsWorld) -> None:
    async with server.client() as http:
        ids = [(await http.post("/v2/ep/runsync?wait=1000", json=body)).json()["id"] for body in (UPLOAD, PROMPT)]
        [record] = await server.jobs.claim(JobKind.GENERATION, OWNER)
        await server.jobs.start(record.id, OWNER)
        await server.jobs.complete(record.id, OWNER, {"images": []})
        world.clock.advance(60)
        assert [await status_code(http, job_id) for job_id in ids] == [404, 404]


async def test_a_key_means_the_generation_also_for_the_next_dispatcher(server: LocalServer, world: JobsWorld) -> None:
    async with server.client() as http:
        job_id = (await send(http, "run", PROMPT))["id"]
        [record] = await server.jobs.claim(JobKind.GENERATION, OWNER)
        await server.jobs.start(record.id, OWNER)
        await server.jobs.complete(record.id, OWNER, {"images": []})
    world.clock.advance(DAY_S // 2)
    async with local_server(world.jobs, world.clock).client() as http:
        assert (await send(http, "run", PROMPT))["id"] == job_id
        assert await status_code(http, job_id) == 200
