"""/stream: each report once, the end with the last of them, and nothing that the clients would trip over."""

import asyncio
from typing import Any

import httpx
import pytest

from serve_app.ingress.runpod_stream import CHUNK_BYTES_MAX
from serve_app.settings import RequestLimits
from serve_app.testing import OTHER_KEY, LocalServer, local_server, train_config, upload_payload
from storage.job_state import JobKind
from storage.job_streams import DRAIN_MAX
from storage.jobs_testing import JobsWorld

OWNER = "dispatcher-1"
PROMPT = {"input": {"prompt": "a red circle"}}


@pytest.fixture
async def server(world: JobsWorld) -> LocalServer:
    return local_server(world.jobs, world.clock, RequestLimits(wait_min_s=0.01, stream_wait_default_s=0.01))


async def begun(server: LocalServer, http: httpx.AsyncClient, kind: JobKind = JobKind.GENERATION) -> tuple[str, str]:
    """The RunPod id and the process id of a job that runs."""
    body: dict[str, Any] = PROMPT
    if kind is JobKind.TRAINING:
        await http.post("/v2/ep/runsync", json={"input": upload_payload("cats")})
        body = {"input": {"type": "train", "config": train_config(), "wait": True}}
    job_id = (await http.post("/v2/ep/run", json=body)).json()["id"]
    [record] = await server.jobs.claim(kind, OWNER)
    await server.jobs.start(record.id, OWNER, worker_id="gpu-0")
    return job_id, record.id


async def stream(http: httpx.AsyncClient, job_id: str, query: str = "") -> dict[str, Any]:
    reply = await http.get(f"/v2/ep/stream/{job_id}{query}")
    assert reply.status_code == 200, reply.text
    body: dict[str, Any] = reply.json()
    assert set(body) == {"status", "stream"}
    return body


def steps(reply: dict[str, Any]) -> list[Any]:
    return [chunk["output"].get("step") for chunk in reply["stream"]]


def step(number: int, **more: Any) -> dict[str, Any]:
    return {"step": number, "total_steps": 4, "stage": "denoising", **more}


async def test_each_step_of_a_generation_is_told_once_and_its_pictures_end_it(server: LocalServer) -> None:
    async with server.client() as http:
        job_id, process_id = await begun(server, http)
        assert await stream(http, job_id) == {"status": "IN_PROGRESS", "stream": []}
        await server.jobs.heartbeat(process_id, OWNER, progress=step(2), events=[step(1), step(2)])
        reply = await stream(http, job_id)
        assert (reply["status"], steps(reply)) == ("IN_PROGRESS", [1, 2])
        assert reply["stream"][0]["output"]["event"] == "progress"
        await server.jobs.complete(process_id, OWNER, {"images": []}, events=[step(3), step(4)])
        last = await stream(http, job_id)
        assert (last["status"], steps(last)) == ("COMPLETED", [3, 4, None])
        assert last["stream"][-1]["output"]["images"] == []
        assert await stream(http, job_id) == {"status": "COMPLETED", "stream": []}
        assert (await http.post(f"/v2/ep/stream/{job_id}")).json()["stream"] == []


async def test_a_training_tells_step_loss_and_each_preview_as_a_url(server: LocalServer) -> None:
    async with server.client() as http:
        job_id, process_id = await begun(server, http, JobKind.TRAINING)
        preview = {"key": "raylora/matt/processes/x/samples/1.png", "step": 5, "index": 0, "prompt": "a cat"}
        later = {**preview, "key": "raylora/matt/processes/x/samples/2.png", "step": 10}
        for number, made in ((1, []), (1, []), (5, [preview]), (6, [preview]), (10, [preview, later])):
            told = {"step": number, "loss": 0.5, "previews": made, "logs": {"loss_key": "raylora/matt/loss.json"}}
            await server.jobs.heartbeat(process_id, OWNER, progress=told)
        outputs = [chunk["output"] for chunk in (await stream(http, job_id))["stream"]]
        live = (await http.get(f"/v2/ep/status/{job_id}")).json()["output"]
    assert [output["step"] for output in outputs] == [1, 5, 6, 10]
    assert {output["loss"] for output in outputs} == {0.5}
    assert not any("logs" in shown for shown in (*outputs, live))
    assert ["preview" in output for output in outputs] == [False, True, False, True]
    assert outputs[1]["preview"].startswith("http")
    [shown] = outputs[3]["previews"]
    assert (shown["type"], shown["filename"], shown["step"]) == ("redirect", "2.png", 10)
    assert [item["filename"] for item in live["previews"]] == ["1.png", "2.png"]


async def test_the_call_waits_for_the_next_report(world: JobsWorld) -> None:
    server = local_server(world.jobs, world.clock)
    async with server.client() as http:
        job_id, process_id = await begun(server, http)
        polling = asyncio.create_task(stream(http, job_id, "?wait=300000"))
        # Whether the report comes before the call waits or after makes no difference to what it answers.
        await asyncio.sleep(0)
        await server.jobs.heartbeat(process_id, OWNER, progress=step(1), events=[step(1)])
        assert steps(await polling) == [1]


async def test_a_status_is_final_only_with_the_last_chunks(server: LocalServer) -> None:
    many = [step(number) for number in range(DRAIN_MAX + 3)]
    async with server.client() as http:
        job_id, process_id = await begun(server, http)
        await server.jobs.complete(process_id, OWNER, {"images": []}, events=many)
        first, second = await stream(http, job_id), await stream(http, job_id)
    assert (first["status"], len(first["stream"])) == ("IN_PROGRESS", DRAIN_MAX)
    assert (second["status"], len(second["stream"])) == ("COMPLETED", 3 + 1)


async def test_a_cancelled_job_is_told_and_then_not_found(server: LocalServer) -> None:
    async with server.client() as http:
        job_id = (await http.post("/v2/ep/run", json=PROMPT)).json()["id"]
        await http.post(f"/v2/ep/cancel/{job_id}")
        told = await stream(http, job_id)
        assert (told["status"], told["stream"][0]["output"]["status"]) == ("CANCELLED", "cancelled")
        again = await http.get(f"/v2/ep/stream/{job_id}")
    assert again.status_code == 404
    assert again.json()["error"] == "job not found"


async def test_a_failed_job_tells_why_and_a_retried_one_streams_anew(server: LocalServer) -> None:
    async with server.client() as http:
        job_id, process_id = await begun(server, http)
        await server.jobs.fail(process_id, OWNER, "out_of_memory", "Not enough memory.")
        failed = await stream(http, job_id)
        assert (failed["status"], failed["stream"][0]["output"]["error"]) == ("FAILED", "Not enough memory.")
        assert await stream(http, job_id) == {"status": "FAILED", "stream": []}
        await http.post(f"/v2/ep/retry/{job_id}")
        assert await stream(http, job_id) == {"status": "IN_QUEUE", "stream": []}
        await server.jobs.claim(JobKind.GENERATION, OWNER)
        await server.jobs.start(process_id, OWNER)
        await server.jobs.complete(process_id, OWNER, {"images": []})
        assert len((await stream(http, job_id))["stream"]) == 1


async def test_a_job_without_a_record_streams_its_output_once(server: LocalServer) -> None:
    async with server.client() as http:
        job_id = (await http.post("/v2/ep/run", json={"input": {"type": "health"}})).json()["id"]
        told = await stream(http, job_id)
        assert (told["status"], told["stream"][0]["output"]["status"]) == ("COMPLETED", "healthy")
        assert await stream(http, job_id) == {"status": "COMPLETED", "stream": []}


async def test_a_chunk_is_at_most_a_megabyte(server: LocalServer) -> None:
    async with server.client() as http:
        job_id, process_id = await begun(server, http)
        await server.jobs.heartbeat(process_id, OWNER, progress=step(1), events=[step(1, note="x" * CHUNK_BYTES_MAX)])
        reply = await http.get(f"/v2/ep/stream/{job_id}")
    assert len(reply.content) < CHUNK_BYTES_MAX
    assert reply.json()["stream"][0]["output"]["step"] == 1


async def test_unknown_and_foreign_ids_are_not_found(server: LocalServer) -> None:
    async with server.client() as http, server.client(OTHER_KEY) as other:
        job_id, _ = await begun(server, http)
        assert (await other.get(f"/v2/ep/stream/{job_id}")).status_code == 404
        assert (await http.get("/v2/ep/stream/unknown")).status_code == 404


async def test_places_in_a_stream_outlive_a_restart(server: LocalServer, world: JobsWorld) -> None:
    async with server.client() as http:
        job_id, process_id = await begun(server, http)
        await server.jobs.heartbeat(process_id, OWNER, progress=step(1), events=[step(1)])
        assert steps(await stream(http, job_id)) == [1]
        await server.jobs.heartbeat(process_id, OWNER, progress=step(2), events=[step(2)])
    world.restart()
    restarted = local_server(world.jobs, world.clock, RequestLimits(wait_min_s=0.01, stream_wait_default_s=0.01))
    async with restarted.client() as http:
        assert steps(await stream(http, job_id)) == [2]
