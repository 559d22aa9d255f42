"""Generations over /v1, and the two calls of foreign clients that wait for their pictures."""

import asyncio
import base64
from typing import Any

import pytest

from diffusion.errors import SizeNotSupported
from serve_app.job_types.context import JobDefaults
from serve_app.testing import KEY, OTHER_KEY, TENANT, LocalServer, local_server
from storage.job_state import JobKind
from storage.jobs_testing import JobsWorld

PROMPT = "a red circle"
OPENAI, HF = "/v1/images/generations", "/v1/hf/tiny"


async def test_a_generation_answers_with_its_pictures_once_they_are_there(working: LocalServer) -> None:
    async with working.client() as http:
        reply = await http.post("/v1/generations", json={"prompt": PROMPT, "seed": 7}, params={"wait": 30})
        assert reply.status_code == 200
        [image] = reply.json()["images"]
        assert (reply.json()["state"], image["seed"], image["prompt"]) == ("COMPLETED", 7, PROMPT)
        assert "method=GET" in image["url"]
        again = (await http.get(f"/v1/generations/{reply.json()['id']}", params={"wait": 1})).json()
        assert again["images"] == [image]
        [listed] = (await http.get("/v1/generations")).json()["items"]
        assert (listed["id"], listed["images"]) == (again["id"], None)


async def test_the_first_block_cache_asked_for_is_in_the_record(server: LocalServer) -> None:
    async with server.client() as http:
        made = (await http.post("/v1/generations", json={"prompt": PROMPT, "first_block_cache": 0.1})).json()
    assert made["spec"]["first_block_cache"] == 0.1


async def test_a_generation_that_waits_no_longer_answers_as_it_stands(server: LocalServer) -> None:
    async with server.client() as http:
        reply = await http.post("/v1/generations", json={"prompt": PROMPT}, params={"wait": 0.01})
    assert (reply.status_code, reply.json()["state"], reply.json()["images"]) == (202, "QUEUED", None)
    assert server.dispatch.wakes == 1


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"prompt": ""},
        {"prompt": "  "},
        {"prompt": "x" * 2001},
        {"prompt": PROMPT, "width": "64"},
        {"prompt": PROMPT, "num_images": 0},
        {"prompt": PROMPT, "surprise": 1},
        {"prompt": PROMPT, "loras": [{"id": "../x"}]},
        {"prompt": PROMPT, "model": "not-served"},
        {"prompt": PROMPT, "first_block_cache": -0.1},
        {"prompt": PROMPT, "first_block_cache": 1.5},
    ],
)
async def test_a_wrong_generation_is_refused_and_nothing_is_queued(server: LocalServer, body: dict[str, Any]) -> None:
    async with server.client() as http:
        assert (await http.post("/v1/generations", json=body)).status_code == 400
        assert (await http.get("/v1/generations")).json()["items"] == []


async def test_a_generation_beyond_the_queues_length_is_told_when_to_come_again(world: JobsWorld) -> None:
    server = local_server(world.jobs, world.clock, defaults=JobDefaults(generation_queue_max=1))
    async with server.client() as http:
        assert (await http.post("/v1/generations", json={"prompt": PROMPT})).status_code == 202
        refused = await http.post("/v1/generations", json={"prompt": PROMPT})
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "10")
    assert "queue_full" in refused.text


@pytest.mark.parametrize(("places", "filled"), [(1, [1, 0]), (2, [1, 1]), (8, [4, 2]), (9, [5, 2])])
async def test_a_tenant_that_fills_the_queue_leaves_places_to_others(
    world: JobsWorld, places: int, filled: list[int]
) -> None:
    server = local_server(world.jobs, world.clock, defaults=JobDefaults(generation_queue_max=places))
    for key, accepted in zip((KEY, OTHER_KEY), filled, strict=True):
        async with server.client(key) as http:
            replies = [await http.post("/v1/generations", json={"prompt": PROMPT}) for _ in range(places + 1)]
        assert [reply.status_code for reply in replies] == [202] * accepted + [429] * (places + 1 - accepted)
        assert f"({accepted} of yours do)" in replies[-1].text


async def test_trainings_and_generations_that_do_not_wait_fill_no_queue(world: JobsWorld) -> None:
    server = local_server(world.jobs, world.clock, defaults=JobDefaults(generation_queue_max=1))
    world.running("w", tenant=TENANT)
    world.create(JobKind.TRAINING, tenant=TENANT)
    async with server.client() as http:
        assert (await http.post("/v1/generations", json={"prompt": PROMPT})).status_code == 202


async def test_a_generation_is_cancelled_by_its_owner_only(server: LocalServer, world: JobsWorld) -> None:
    made = world.create(JobKind.GENERATION, tenant=TENANT)
    path = f"/v1/generations/{made.id}/cancel"
    async with server.client(OTHER_KEY) as stranger, server.client() as http:
        assert (await stranger.post(path)).status_code == 404
        assert (await http.post(path)).json()["state"] == "CANCELLED"
    world.running("o", tenant=TENANT)


async def test_a_completed_generation_cannot_be_cancelled(working: LocalServer) -> None:
    async with working.client() as http:
        made = (await http.post("/v1/generations", json={"prompt": PROMPT}, params={"wait": 30})).json()
        reply = await http.post(f"/v1/generations/{made['id']}/cancel")
    assert (reply.status_code, reply.json()["code"]) == (409, "job_not_cancellable")


async def test_the_openai_call_answers_with_urls_or_bytes(working: LocalServer) -> None:
    async with working.client() as http:
        body = {"prompt": PROMPT, "size": "64x32", "seed": 3, "user": "me", "quality": "hd"}
        by_url = await http.post(OPENAI, json=body)
        assert by_url.status_code == 200, by_url.text
        assert [sorted(item) for item in by_url.json()["data"]] == [["seed", "url"]]
        inline = (await http.post(OPENAI, json={**body, "response_format": "b64_json"})).json()
        assert base64.b64decode(inline["data"][0]["b64_json"]) == PROMPT.encode()
        [first, _] = (await http.get("/v1/generations")).json()["items"]
    assert (first["spec"]["width"], first["spec"]["height"]) == (64, 32)


@pytest.mark.parametrize(
    ("body", "param"),
    [({}, "prompt"), ({"prompt": PROMPT, "size": "big"}, "size"), ({"prompt": PROMPT, "stream": True}, "stream")],
)
async def test_the_openai_call_errs_in_openais_shape(server: LocalServer, body: dict[str, Any], param: str) -> None:
    async with server.client() as http:
        reply = await http.post(OPENAI, json=body)
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, "invalid_request")


async def test_a_missing_key_is_told_in_each_surfaces_shape(server: LocalServer) -> None:
    async with server.client(key=None) as http:
        assert (await http.post(OPENAI, json={})).json()["error"]["type"] == "authentication_error"
        assert (await http.post(HF, json={})).json()["error_type"] == "unauthorized"
        assert (await http.post("/v1/generations", json={})).json()["code"] == "unauthorized"


async def test_the_hugging_face_call_answers_with_the_picture_itself(working: LocalServer) -> None:
    async with working.client() as http:
        body = {"inputs": PROMPT, "parameters": {"width": 64, "height": 64, "seed": 9}}
        reply = await http.post(HF, json=body)
        assert (reply.status_code, reply.content) == (200, PROMPT.encode())
        assert (reply.headers["content-type"], reply.headers["x-seed"]) == ("image/png", "9")
        assert (await http.post("/v1/hf/org/model", json=body)).status_code == 200
        unknown = await http.post("/v1/hf/org/other", json=body)
    assert (unknown.status_code, unknown.json()["error_type"]) == (400, "model_not_served")


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [(SizeNotSupported(1, 2, 8), 400, "generation_refused"), (RuntimeError("secret"), 500, "generation_failed")],
)
async def test_a_waiting_call_tells_why_the_generation_failed(
    working: LocalServer, error: Exception, status: int, code: str
) -> None:
    working.inference.errors.append(error)
    async with working.client() as http:
        reply = await http.post(HF, json={"inputs": PROMPT})
    assert (reply.status_code, reply.json()["error_type"]) == (status, code)
    assert "secret" not in reply.text


async def test_a_client_that_goes_away_cancels_what_it_waited_for(server: LocalServer) -> None:
    queued = asyncio.Event()

    async def wake() -> None:
        queued.set()

    server.dispatch.wake = wake  # type: ignore[method-assign]
    async with server.client() as http:
        waiting = asyncio.create_task(http.post(OPENAI, json={"prompt": PROMPT}))
        await queued.wait()
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        [made] = (await http.get("/v1/generations")).json()["items"]
    assert made["state"] == "CANCELLED"


async def test_a_completed_generation_has_done_all_its_steps(server: LocalServer, world: JobsWorld) -> None:
    record = world.running("dispatcher-1", JobKind.GENERATION, tenant=TENANT)
    last_heard = {"step": 19, "total_steps": 30, "stage": "denoising"}
    world.jobs.heartbeat(record.id, "dispatcher-1", progress=last_heard)
    world.jobs.complete(record.id, "dispatcher-1", {"images": []})
    async with server.client() as http:
        view = (await http.get(f"/v1/generations/{record.id}")).json()
        body = {"input": {"type": "process_status", "process_id": record.id}}
        process = (await http.post("/v2/ep/runsync", json=body)).json()["output"]
    assert (view["progress"]["step"], view["progress"]["total_steps"]) == (30, 30)
    assert (process["step"], process["total_steps"]) == (30, 30)


async def test_a_whole_number_may_be_written_with_a_point(server: LocalServer) -> None:
    body = '{"prompt": "a red circle", "seed": 7.0, "width": 6.4e1, "height": 64.0, "guidance_scale": 1.5}'
    async with server.client() as http:
        made = await http.post("/v1/generations", content=body)
        refused = await http.post("/v1/generations", content='{"prompt": "a red circle", "seed": 7.5}')
    assert made.status_code == 202, made.text
    [record] = (await server.jobs.list("matt")).records
    assert (record.request["spec"]["seed"], record.request["spec"]["width"]) == (7, 64)
    assert refused.status_code == 400
