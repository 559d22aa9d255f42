"""RunPod's operations over the real records: what existing clients see."""

import asyncio
import re
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from serve_app.dispatch.reply import Opening
from serve_app.settings import RequestLimits
from serve_app.testing import OTHER_KEY, TENANT, LocalServer, local_server, train_config, upload_payload
from storage.errors import StorageUnavailable
from storage.job_record import NewJob
from storage.job_state import JobKind, JobState
from storage.jobs_testing import JobsWorld

PROMPT = {"input": {"prompt": "a red circle"}}
RUN_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}-u1")
OWNER = "dispatcher-1"


async def post(http: httpx.AsyncClient, path: str, **options: Any) -> dict[str, Any]:
    reply = await http.post(f"/v2/ep/{path}", **options)
    assert reply.status_code == 200, reply.text
    body: dict[str, Any] = reply.json()
    return body


async def status(http: httpx.AsyncClient, job_id: str) -> dict[str, Any]:
    reply = await http.get(f"/v2/ep/status/{job_id}")
    assert reply.status_code == 200, reply.text
    body: dict[str, Any] = reply.json()
    return body


async def status_when(http: httpx.AsyncClient, job_id: str, holds: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """A status is answered from a watched copy, which may be a moment behind a change made elsewhere."""
    async with asyncio.timeout(20):
        while not holds(body := await status(http, job_id)):  # noqa: ASYNC110 - nothing tells a client
            await asyncio.sleep(0.01)
    return body


async def start_one(server: LocalServer) -> str:
    [record] = await server.jobs.claim(JobKind.GENERATION, OWNER)
    await server.jobs.start(record.id, OWNER, worker_id="gpu-0")
    return record.id


async def test_run_answers_with_an_id_and_in_queue_and_wakes_the_dispatcher(server: LocalServer) -> None:
    async with server.client() as http:
        reply = await post(http, "run", json=PROMPT)
        assert reply["status"] == "IN_QUEUE"
        assert RUN_ID.fullmatch(reply["id"])
        assert (await status(http, reply["id"]))["status"] == "IN_QUEUE"
    assert server.dispatch.wakes == 1


async def test_a_generation_is_followed_from_queue_to_pictures(server: LocalServer, world: JobsWorld) -> None:
    async with server.client() as http:
        job_id = (await post(http, "run", json=PROMPT))["id"]
        world.clock.advance(2)
        process_id = await start_one(server)
        await server.jobs.heartbeat(process_id, OWNER, progress={"step": 1, "total_steps": 4})
        running = await status_when(http, job_id, lambda body: (body.get("output") or {}).get("progress") == 25.0)
        assert running["status"] == "IN_PROGRESS"
        world.clock.advance(3)
        image = {
            "key": f"raylora/matt/processes/{process_id}/images/1.png",
            "filename": "1.png",
            "size_bytes": 5,
            "sha256": "ab",
            "content_type": "image/png",
            "seed": 7,
        }
        await server.jobs.complete(process_id, OWNER, {"images": [image]})
        done = await status_when(http, job_id, lambda body: body["status"] != "IN_PROGRESS")
    assert (done["status"], done["delayTime"], done["executionTime"], done["workerId"]) == (
        "COMPLETED",
        2000,
        3000,
        "gpu-0",
    )
    [shown] = done["output"]["images"]
    assert shown.pop("url").startswith("http")
    assert shown == {
        "type": "redirect",
        "filename": "1.png",
        "size": 5,
        "s3_key": image["key"],
        "sha256": "ab",
        "content_type": "image/png",
        "seed": 7,
    }
    assert done["output"]["runpod_job_id"] == job_id
    assert done["output"]["timing"]["duration_ms"] == 3000
    record = await server.jobs.get(process_id)
    assert "http" not in str(record.output)


async def test_runsync_holds_the_line_until_the_job_ends(server: LocalServer) -> None:
    async with server.client() as http:
        call = asyncio.create_task(post(http, "runsync", json=PROMPT))
        while not (await server.jobs.counts("matt"))[JobState.QUEUED]:
            pass
        process_id = await start_one(server)
        await server.jobs.complete(process_id, OWNER, {"images": []})
        reply = await call
    assert reply["status"] == "COMPLETED"
    assert reply["id"].startswith("sync-")
    assert RUN_ID.fullmatch(reply["id"].removeprefix("sync-"))


async def test_runsync_returns_the_unfinished_status_when_its_wait_is_over(world: JobsWorld) -> None:
    server = local_server(world.jobs, world.clock, RequestLimits(wait_min_s=0.01))
    async with server.client() as http:
        reply = await post(http, "runsync?wait=10", json=PROMPT)
        assert reply["status"] == "IN_QUEUE"
        assert (await post(http, f"status-sync/{reply['id']}?wait=10"))["status"] == "IN_QUEUE"


@pytest.mark.parametrize("wait", ["x", "-1", "1.5", ""])
async def test_a_wait_that_is_no_number_is_refused(server: LocalServer, wait: str) -> None:
    async with server.client() as http:
        assert (await http.post(f"/v2/ep/runsync?wait={wait}", json=PROMPT)).status_code == 400


@pytest.mark.parametrize("operation", ["run", "runsync"])
async def test_a_quick_job_type_is_a_runpod_job_too(server: LocalServer, operation: str) -> None:
    async with server.client() as http:
        reply = await post(http, operation, json={"input": {"type": "health"}})
        done = await status(http, reply["id"])
    assert done["status"] == "COMPLETED"
    output = done["output"]
    assert output["status"] == "healthy"
    assert output["runpod_job_id"] == reply["id"]
    assert set(output["timing"]) == {"duration_ms", "timestamp"}
    assert {"request_id", "worker_id"} <= set(output)


async def test_an_error_in_the_output_makes_the_job_failed_with_error_a_string(server: LocalServer) -> None:
    async with server.client() as http:
        reply = await post(http, "runsync", json={"input": {"type": "nonsense"}})
        assert reply["status"] == "FAILED"
        assert reply["error"] == "Unknown job type: nonsense"
        assert reply["output"]["error_type"] == "unknown_job_type"
        empty = await post(http, "runsync", json={"input": {"prompt": "", "width": "wide"}})
    assert empty["error"].startswith("Invalid request: ")
    assert {problem["path"] for problem in empty["output"]["validation_errors"]} == {"prompt", "width"}


async def test_no_record_exists_for_a_refused_request(server: LocalServer) -> None:
    async with server.client() as http:
        reply = await post(http, "run", json={"input": {"prompt": "x", "model": "unknown"}})
        assert (await status(http, reply["id"]))["status"] == "FAILED"
    assert sum((await server.jobs.counts()).values()) == 0


@pytest.mark.parametrize("operation", ["status", "status-sync", "cancel", "retry"])
async def test_unknown_and_foreign_ids_are_404_alike(server: LocalServer, operation: str) -> None:
    async with server.client() as http:
        record_id = (await post(http, "run", json=PROMPT))["id"]
        quick_id = (await post(http, "run", json={"input": {"type": "health"}}))["id"]
        accepted_id = (await post(http, "run", json={"input": {"prompt": "a", "wait": False}}))["id"]
    async with server.client(OTHER_KEY) as http:
        for job_id in (record_id, quick_id, accepted_id, "nothing-u1", f"accepted:{accepted_id}"):
            reply = await http.post(f"/v2/ep/{operation}/{job_id}")
            assert reply.status_code == 404
            assert reply.json()["error"] == "job not found"


async def test_an_internal_spelling_of_an_id_is_not_an_id(server: LocalServer) -> None:
    async with server.client() as http:
        accepted_id = (await post(http, "run", json={"input": {"prompt": "a", "wait": False}}))["id"]
        assert (await http.get(f"/v2/ep/status/accepted:{accepted_id}")).status_code == 404


async def test_a_result_expires_and_its_process_stays(server: LocalServer, world: JobsWorld) -> None:
    async with server.client() as http:
        job_id = (await post(http, "run", json=PROMPT))["id"]
        process_id = await start_one(server)
        await server.jobs.complete(process_id, OWNER, {"images": []})
        world.clock.advance(1799)
        assert (await status(http, job_id))["status"] == "COMPLETED"
        world.clock.advance(2)
        assert (await http.get(f"/v2/ep/status/{job_id}")).status_code == 404
    assert (await server.jobs.get(process_id)).state is JobState.COMPLETED


async def test_cancel_arrives_with_an_empty_body_and_ends_a_queued_job(server: LocalServer) -> None:
    async with server.client() as http:
        job_id = (await post(http, "run", json=PROMPT))["id"]
        headers = {"Content-Type": "application/json", "Content-Length": "0"}
        assert await post(http, f"cancel/{job_id}", headers=headers) == {"id": job_id, "status": "CANCELLED"}
        assert (await status(http, job_id))["status"] == "CANCELLED"


async def test_cancel_asks_running_work_to_stop(server: LocalServer) -> None:
    async with server.client() as http:
        job_id = (await post(http, "run", json=PROMPT))["id"]
        process_id = await start_one(server)
        assert (await post(http, f"cancel/{job_id}"))["status"] == "CANCELLED"
    assert (await server.jobs.heartbeat(process_id, OWNER)).cancel_requested


async def test_cancelling_what_has_ended_tells_how_it_ended(server: LocalServer) -> None:
    async with server.client() as http:
        job_id = (await post(http, "run", json=PROMPT))["id"]
        await server.jobs.complete(await start_one(server), OWNER, {"images": []})
        assert (await post(http, f"cancel/{job_id}"))["status"] == "COMPLETED"


async def test_retry_keeps_the_id_and_takes_only_what_failed(server: LocalServer) -> None:
    async with server.client() as http:
        job_id = (await post(http, "run", json=PROMPT))["id"]
        assert (await http.post(f"/v2/ep/retry/{job_id}")).status_code == 409
        await server.jobs.fail(await start_one(server), OWNER, "code", "it broke")
        assert (await status(http, job_id))["error"] == "it broke"
        assert await post(http, f"retry/{job_id}") == {"id": job_id, "status": "IN_QUEUE"}
        again = await status(http, job_id)
    assert (again["status"], again["retries"]) == ("IN_QUEUE", 1)
    assert "error" not in again
    assert server.dispatch.wakes == 2


async def test_a_timed_out_job_says_after_how_long(server: LocalServer) -> None:
    async with server.client() as http:
        body = {**PROMPT, "policy": {"executionTimeout": 5000}}
        job_id = (await post(http, "run", json=body))["id"]
        await server.jobs.timed_out(await start_one(server), OWNER)
        ended = await status(http, job_id)
    assert (ended["status"], ended["error"]) == ("TIMED_OUT", "Request timeout after 5 seconds")
    assert ended["output"]["timeout"] is True


async def test_a_job_whose_time_to_live_ran_out_says_so(server: LocalServer, world: JobsWorld) -> None:
    async with server.client() as http:
        body = {**PROMPT, "policy": {"ttl": 5000}}
        waiting = (await post(http, "run", json=body))["id"]
        world.clock.advance(6)
        world.jobs.reap()
        waited = await status(http, waiting)
        working = (await post(http, "run", json=body | {"input": {"prompt": "another"}}))["id"]
        record = await start_one(server)
        world.clock.advance(6)
        await server.jobs.timed_out(record, OWNER)
        worked = await status(http, working)
    assert (waited["status"], worked["status"]) == ("TIMED_OUT", "TIMED_OUT")
    assert waited["error"] == "The job waited longer than its time to live of 5 seconds"
    assert worked["error"] == "The job did not end within its time to live of 5 seconds"


async def test_purge_takes_what_is_queued_and_health_counts_truly(server: LocalServer) -> None:
    async with server.client() as http:
        for prompt in "abcd":
            await post(http, "run", json={"input": {"prompt": prompt}})
        await server.jobs.complete(await start_one(server), OWNER, {"images": []})
        await start_one(server)
        expected = {"completed": 1, "failed": 0, "inProgress": 1, "inQueue": 2, "retried": 0}
        health = (await http.get("/v2/ep/health")).json()
        assert health["jobs"] == expected
        assert health["workers"] == {
            "idle": 1,
            "initializing": 0,
            "ready": 1,
            "running": 0,
            "throttled": 0,
            "unhealthy": 0,
        }
        assert await post(http, "purge-queue") == {"removed": 2, "status": "completed"}
        assert (await http.get("/v2/ep/health")).json()["jobs"]["inQueue"] == 0
    async with server.client(OTHER_KEY) as http:
        assert set((await http.get("/v2/ep/health")).json()["jobs"].values()) == {0}


async def test_the_same_body_within_the_window_starts_once(server: LocalServer, world: JobsWorld) -> None:
    async with server.client() as http:
        first = await post(http, "run", json=PROMPT)
        assert await post(http, "run", json=PROMPT) == first
        assert sum((await server.jobs.counts()).values()) == 1
        world.clock.advance(11)
        assert await post(http, "run", json=PROMPT) != first
    assert sum((await server.jobs.counts()).values()) == 2


async def test_a_hundred_copies_at_the_same_moment_start_once(server: LocalServer) -> None:
    async with server.client() as http:
        replies = await asyncio.gather(*(post(http, "run", json=PROMPT) for _ in range(100)))
    assert replies == [replies[0]] * 100
    # The reply may come before its record on a busy machine.
    async with asyncio.timeout(30):
        while not sum((await server.jobs.counts()).values()):  # noqa: ASYNC110 - the database tells nobody
            await asyncio.sleep(0.01)
    assert sum((await server.jobs.counts()).values()) == 1


async def test_a_refused_body_may_be_sent_again_at_once(server: LocalServer) -> None:
    body = {"input": {"type": "train", "config": train_config()}}
    async with server.client() as http:
        refused = await post(http, "run", json=body)
        assert (await status(http, refused["id"]))["status"] == "FAILED"
        await post(http, "runsync", json={"input": upload_payload("cats")})
        accepted = await post(http, "run", json=body)
        assert (await status(http, accepted["id"]))["status"] == "COMPLETED"


async def test_reading_twice_within_the_window_reads_twice(server: LocalServer) -> None:
    async with server.client() as http:
        first = await post(http, "run", json={"input": {"type": "processes"}})
        assert await post(http, "run", json={"input": {"type": "processes"}}) != first


async def test_an_idempotency_key_replays_and_refuses_another_body(server: LocalServer, world: JobsWorld) -> None:
    key = {"Idempotency-Key": "k1"}
    async with server.client() as http:
        first = await post(http, "run", json=PROMPT, headers=key)
        world.clock.advance(3599)
        assert await post(http, "run", json=PROMPT, headers=key) == first
        other = await http.post("/v2/ep/run", json={"input": {"prompt": "other"}}, headers=key)
        assert other.status_code == 422
    async with server.client(OTHER_KEY) as http:
        assert await post(http, "run", json=PROMPT, headers=key) != first


async def test_an_idempotency_key_outlives_the_dispatcher(server: LocalServer, world: JobsWorld) -> None:
    key = {"Idempotency-Key": "k1"}
    async with server.client() as http:
        first = await post(http, "run", json=PROMPT, headers=key)
    restarted = local_server(world.jobs, world.clock)
    async with restarted.client() as http:
        for _ in range(2):
            assert await post(http, "run", json=PROMPT, headers=key) == first
        assert (await status(http, first["id"]))["status"] == "IN_QUEUE"
    assert sum((await server.jobs.counts()).values()) == 1


async def test_an_accepted_training_is_still_completed_after_a_restart(server: LocalServer, world: JobsWorld) -> None:
    async with server.client() as http:
        await post(http, "runsync", json={"input": upload_payload("cats")})
        asked = {"type": "train", "config": train_config(), "stepz": 5}
        reply = await post(http, "run", json={"input": asked})
        before = await status(http, reply["id"])
    restarted = local_server(world.jobs, world.clock)
    async with restarted.client() as http:
        after = await status(http, reply["id"])
    assert before["status"] == after["status"] == "COMPLETED"
    assert before["output"]["process_id"] == after["output"]["process_id"]
    assert before["output"]["warnings"] == after["output"]["warnings"] == ["Unknown field 'stepz' was ignored"]


async def test_a_job_whose_ingress_was_lost_is_its_record_or_has_failed(server: LocalServer, world: JobsWorld) -> None:
    for runpod_id in ("recorded-u1", "nothing-u1"):
        server.dispatch.replies.open(TENANT, runpod_id, Opening(60.0, owner="lost"))
    await server.jobs.create(NewJob(kind=JobKind.GENERATION, tenant=TENANT, request={}, runpod_id="recorded-u1"))
    async with server.client() as http:
        assert (await status(http, "nothing-u1"))["status"] == "IN_QUEUE"
        world.clock.advance(31)
        nothing = await status(http, "nothing-u1")
        assert (nothing["status"], nothing["output"]["error_type"]) == ("FAILED", "job_interrupted")
        await start_one(server)
        assert (await status(http, "recorded-u1"))["status"] == "IN_PROGRESS"
        assert (await post(http, "cancel/recorded-u1"))["status"] == "CANCELLED"


async def test_readyz_asks_every_part(server: LocalServer) -> None:
    async with server.client() as http:
        ready = await http.get("/readyz")
        assert ready.status_code == 200
        assert {name: check["ok"] for name, check in ready.json()["checks"].items()} == {
            "storage": True,
            "jobs": True,
            "gpu": True,
            "replicas": True,
            "disk": True,
        }
        server.store.break_down(StorageUnavailable("get", 30))
        broken = await http.get("/readyz")
    assert broken.status_code == 503
    assert broken.json()["checks"]["storage"]["ok"] is False
    assert broken.json()["checks"]["jobs"]["ok"] is True


async def test_an_open_breaker_fails_the_job_and_not_the_server(server: LocalServer) -> None:
    server.store.break_down(StorageUnavailable("get", 30))
    async with server.client() as http:
        reply = await post(http, "runsync", json={"input": upload_payload("cats")})
    assert reply["status"] == "FAILED"
    assert reply["output"]["error_type"] == "dataset_not_stored"


async def test_run_answers_while_its_job_type_is_still_at_work(world: JobsWorld) -> None:
    server = local_server(world.jobs, world.clock, RequestLimits(run_answer_s=0.01))
    held = server.store.hold("put")
    async with server.client() as http:
        reply = await post(http, "run", json={"input": upload_payload("cats")})
        assert (await status(http, reply["id"]))["status"] == "IN_PROGRESS"
        held.set()
        assert (await post(http, f"status-sync/{reply['id']}"))["status"] == "COMPLETED"
