"""RunPod jobs without a record: cancelled, timed out, counted, sent again."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from serve_app.ingress import job_runner
from serve_app.ingress.envelope import S3_CONFIG_IGNORED
from serve_app.job_types.context import public_runpod_id
from serve_app.settings import RequestLimits
from serve_app.testing import TENANT, LocalServer, local_server, train_config, upload_payload
from storage.errors import StorageUnavailable
from storage.job_state import JobKind, JobState
from storage.jobs_testing import JobsWorld
from storage.webhook_record import Webhook

PROMPT = {"input": {"prompt": "a red circle"}}
UPLOAD = {"input": upload_payload("cats")}


@pytest.fixture
async def quick(world: JobsWorld) -> LocalServer:
    """A server whose /run answers at once."""
    return local_server(world.jobs, world.clock, RequestLimits(run_answer_s=0.01))


async def post(http: httpx.AsyncClient, path: str, **options: Any) -> dict[str, Any]:
    reply = await http.post(f"/v2/ep/{path}", **options)
    assert reply.status_code == 200, reply.text
    body: dict[str, Any] = reply.json()
    return body


async def webhooks_of(server: LocalServer) -> list[Webhook]:
    """Once there are any: the last that the task of a job does."""
    async with asyncio.timeout(20):
        while not (told := await server.jobs.take_webhooks()):  # noqa: ASYNC110 - the job's task ends by itself
            await asyncio.sleep(0.01)
    return told


async def is_cancelled(server: LocalServer) -> bool:
    """Whether the only record is there and is."""
    records = (await server.jobs.list(TENANT)).records
    return [record.state for record in records] == [JobState.CANCELLED]


async def test_a_cancelled_upload_stops_and_says_so_once(quick: LocalServer, world: JobsWorld) -> None:
    held = quick.store.hold("put")
    async with quick.client() as http:
        body = UPLOAD | {"webhook": "https://example.com/told"}
        job_id = (await post(http, "run", json=body))["id"]
        assert await post(http, f"cancel/{job_id}") == {"id": job_id, "status": "CANCELLED"}
        assert await post(http, f"cancel/{job_id}") == {"id": job_id, "status": "CANCELLED"}
        ended = await post(http, f"status-sync/{job_id}")
        assert (ended["status"], "error" in ended, "output" in ended) == ("CANCELLED", False, False)
        told = await webhooks_of(quick)
        held.set()
        assert quick.store.keys() == []
        assert (await post(http, f"status/{job_id}"))["status"] == "CANCELLED"
    assert len(told) == 1


async def test_the_stream_of_a_cancelled_job_ends(quick: LocalServer) -> None:
    quick.store.hold("put")
    async with quick.client() as http:
        job_id = (await post(http, "run", json=UPLOAD))["id"]
        await post(http, f"cancel/{job_id}")
        assert await post(http, f"stream/{job_id}") == {"status": "CANCELLED", "stream": []}
        # RunPod's Python client never stops asking for more of a cancelled job.
        assert (await http.post(f"/v2/ep/stream/{job_id}")).status_code == 404


async def test_what_another_replica_cancelled_stops_here(
    quick: LocalServer, world: JobsWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_runner, "KEEP_INTERVAL_S", 0.01)
    held = quick.store.hold("put")
    async with quick.client() as http:
        job_id = (await post(http, "run", json=UPLOAD | {"webhook": "https://example.com/told"}))["id"]
        cancelled = quick.dispatch.replies.cancel(TENANT, job_id)
        assert cancelled is not None
        assert len(await webhooks_of(quick)) == 1
        held.set()
        await asyncio.sleep(0.05)
        assert (await post(http, f"status/{job_id}"))["status"] == "CANCELLED"
    assert quick.store.keys() == []


async def test_a_generation_cancelled_while_it_is_accepted_does_not_run(
    quick: LocalServer, world: JobsWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, create = asyncio.Event(), quick.jobs.create

    async def slow(*args: Any, **kwargs: Any) -> Any:
        record = await create(*args, **kwargs)
        await made.wait()
        return record

    monkeypatch.setattr(quick.jobs, "create", slow)
    monkeypatch.setattr("serve_app.ingress.runpod_jobs.TAKE_OVER_S", 0.01)
    async with quick.client() as http:
        job_id = (await post(http, "run", json=PROMPT))["id"]
        assert (await post(http, f"status/{job_id}"))["status"] == "IN_QUEUE"
        assert (await post(http, f"cancel/{job_id}"))["status"] == "CANCELLED"
        assert (await post(http, f"status/{job_id}"))["status"] == "CANCELLED"
        async with asyncio.timeout(20):
            while not await is_cancelled(quick):  # noqa: ASYNC110 - the job's task ends by itself
                await asyncio.sleep(0.01)
        made.set()
    assert await quick.jobs.claim(JobKind.GENERATION, "dispatcher-1") == []


async def test_a_generation_that_is_accepted_in_time_is_cancelled_by_its_record(quick: LocalServer) -> None:
    async with quick.client() as http:
        job_id = (await post(http, "run", json=PROMPT))["id"]
        assert (await post(http, f"cancel/{job_id}"))["status"] == "CANCELLED"
        assert (await post(http, f"status/{job_id}"))["status"] == "CANCELLED"


async def test_the_clients_time_limit_is_kept_and_is_no_failure(quick: LocalServer, monkeypatch: Any) -> None:
    monkeypatch.setattr("serve_app.ingress.envelope.POLICY_MIN_MS", 1)
    quick.store.hold("put")
    async with quick.client() as http:
        job_id = (await post(http, "run", json=UPLOAD | {"policy": {"executionTimeout": 5000}}))["id"]
        ended = await post(http, f"status-sync/{job_id}?wait=20000")
        assert ended["status"] == "TIMED_OUT"
        assert ended["error"] == "Request timeout after 5 seconds"
        assert ended["output"]["timeout"] is True


async def test_health_counts_jobs_without_a_record_too(quick: LocalServer) -> None:
    quick.store.hold("put")
    async with quick.client() as http:
        before = (await http.get("/v2/ep/health")).json()["jobs"]
        await post(http, "runsync", json={"input": {"type": "health"}})
        await post(http, "run", json={"input": {"type": "list_models"}})
        failed = await post(http, "runsync", json={"input": {"type": "nonsense"}})
        assert failed["status"] == "FAILED"
        await post(http, "run", json=UPLOAD)
        wanted = {"completed": 2, "failed": 1, "inProgress": 1, "inQueue": 0, "retried": 0}
        async with asyncio.timeout(20):
            while True:
                after = (await http.get("/v2/ep/health")).json()["jobs"]
                if {name: after[name] - before[name] for name in before} == wanted:
                    return
                # Replies of /runsync are told together.
                await asyncio.sleep(0.05)


@pytest.mark.parametrize("wait", [True, False])
async def test_the_same_body_after_a_cancel_is_a_new_job(quick: LocalServer, wait: bool) -> None:
    body = {"input": {**PROMPT["input"], "wait": wait}}
    async with quick.client() as http:
        first = (await post(http, "run", json=body))["id"]
        async with asyncio.timeout(20):
            while not (records := (await quick.jobs.list(TENANT)).records):  # noqa: ASYNC110 - accepted by itself
                await asyncio.sleep(0.01)
        assert (await post(http, "run", json=body))["id"] == first
        await quick.jobs.request_cancel(records[0].id, tenant=TENANT)
        again, twice = await asyncio.gather(post(http, "run", json=body), post(http, "run", json=body))
        assert again["id"] == twice["id"] != first
        async with asyncio.timeout(20):
            while len((await quick.jobs.list(TENANT)).records) < 2:  # noqa: ASYNC110 - accepted by itself
                await asyncio.sleep(0.01)
        assert (await post(http, "run", json=body))["id"] == again["id"]
        await asyncio.sleep(0.05)
        assert len((await quick.jobs.list(TENANT)).records) == 2


async def test_the_same_body_after_it_was_done_is_the_job_that_was_done(quick: LocalServer) -> None:
    async with quick.client() as http:
        first = (await post(http, "run", json=PROMPT))["id"]
        async with asyncio.timeout(20):
            while not (claimed := await quick.jobs.claim(JobKind.GENERATION, "d")):  # noqa: ASYNC110 - queued by itself
                await asyncio.sleep(0.01)
        await quick.jobs.start(claimed[0].id, "d", worker_id="gpu-0")
        await quick.jobs.complete(claimed[0].id, "d", {"images": []})
        assert (await post(http, "run", json=PROMPT))["id"] == first


@pytest.mark.parametrize("name", [[], {}, None, 1, ["generate"]])
@pytest.mark.parametrize("call", ["run", "runsync"])
async def test_a_type_that_is_no_name_is_a_job_that_failed(quick: LocalServer, call: str, name: Any) -> None:
    async with quick.client() as http:
        job_id = (await post(http, call, json={"input": {"type": name}}))["id"]
        ended = await post(http, f"status-sync/{job_id}")
    assert ended["status"] == "FAILED"


async def test_a_job_that_was_taken_for_lost_has_one_end(quick: LocalServer, world: JobsWorld) -> None:
    held = quick.store.hold("put")
    async with quick.client() as http:
        job_id = (await post(http, "run", json=UPLOAD | {"webhook": "https://example.com/told"}))["id"]
        world.clock.advance(31)
        quick.dispatch.replies.hear_from("another")
        assert (await post(http, f"status/{job_id}"))["status"] == "FAILED"
        held.set()
        told = await webhooks_of(quick)
        assert (await post(http, f"status/{job_id}"))["status"] == "FAILED"
    assert told[0].body is not None
    assert told[0].body["status"] == "FAILED"


async def test_a_process_has_its_own_worker_and_not_the_one_that_answers(quick: LocalServer) -> None:
    async with quick.client() as http:
        accepted = await post(http, "runsync", json={"input": {**PROMPT["input"], "wait": False}})
        asked = {"input": {"type": "process_status", "process_id": accepted["output"]["process_id"]}}
        assert (await post(http, "runsync", json=asked))["output"]["worker_id"] is None
        [record] = await quick.jobs.claim(JobKind.GENERATION, "d")
        await quick.jobs.start(record.id, "d", worker_id="gpu-0")
        assert (await post(http, "runsync", json=asked))["output"]["worker_id"] == "gpu-0"
        listed = (await post(http, "runsync", json={"input": {"type": "list_models"}}))["output"]
    assert listed["worker_id"]


async def test_a_client_that_goes_away_while_its_job_is_noted_leaves_one_that_is_done(
    quick: LocalServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    noting, may_go_on, opened = asyncio.Event(), asyncio.Event(), quick.dispatch.open_reply

    async def slow(*args: Any) -> str:
        known = await opened(*args)
        noting.set()
        await may_go_on.wait()
        return known

    monkeypatch.setattr(quick.dispatch, "open_reply", slow)
    async with quick.client() as http:
        keyed = {"json": {"input": {"type": "list_models"}}, "headers": {"Idempotency-Key": "k"}}
        gone = asyncio.create_task(http.post("/v2/ep/run", **keyed))
        await noting.wait()
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        may_go_on.set()
        job_id = (await post(http, "run", **keyed))["id"]
        assert (await post(http, f"status-sync/{job_id}?wait=5000"))["status"] == "COMPLETED"


@pytest.mark.parametrize("call", ["run", "runsync"])
async def test_a_failed_upload_is_retried_under_its_id(quick: LocalServer, call: str) -> None:
    quick.store.fail("put", StorageUnavailable("put", 1.0))
    async with quick.client() as http:
        job_id = (await post(http, call, json=UPLOAD | {"webhook": "https://example.com/told"}))["id"]
        assert (await post(http, f"status-sync/{job_id}?wait=5000"))["status"] == "FAILED"
        assert len(await webhooks_of(quick)) == 1
        before = (await http.get("/v2/ep/health")).json()["jobs"]
        assert await post(http, f"retry/{job_id}") == {"id": job_id, "status": "IN_QUEUE"}
        ended = await post(http, f"status-sync/{job_id}?wait=5000")
        assert (ended["status"], ended["retries"], "error" in ended) == ("COMPLETED", 1, False)
        assert ended["output"]["runpod_job_id"] == job_id
        after = (await http.get("/v2/ep/health")).json()["jobs"]
        refused = await http.post(f"/v2/ep/retry/{job_id}")
        assert (refused.status_code, refused.json()["error_type"]) == (409, "job_not_retryable")
        [told] = await webhooks_of(quick)
    assert quick.store.keys()
    assert after["retried"] == before["retried"] + 1
    assert told.body is not None


async def test_two_retries_are_one(quick: LocalServer) -> None:
    quick.store.fail("put", StorageUnavailable("put", 1.0))
    async with quick.client() as http:
        job_id = (await post(http, "run", json=UPLOAD))["id"]
        assert (await post(http, f"status-sync/{job_id}?wait=5000"))["status"] == "FAILED"
        held = quick.store.hold("put")
        answers = await asyncio.gather(*(http.post(f"/v2/ep/retry/{job_id}") for _ in range(2)))
        held.set()
        assert sorted(answer.status_code for answer in answers) == [200, 409]
        assert (await post(http, f"status-sync/{job_id}?wait=5000"))["retries"] == 1


async def test_a_training_that_was_refused_is_retried_once_its_cause_is_mended(quick: LocalServer) -> None:
    async with quick.client() as http:
        asked = {"input": {"type": "train", "config": train_config("later")}}
        job_id = (await post(http, "run", json=asked))["id"]
        ended = await post(http, f"status-sync/{job_id}?wait=5000")
        assert (ended["status"], ended["output"]["error_type"]) == ("FAILED", "dataset_not_found")
        await post(http, "runsync", json={"input": upload_payload("later")})
        await post(http, f"retry/{job_id}")
        assert (await post(http, f"status-sync/{job_id}?wait=5000"))["status"] == "COMPLETED"
    [record] = (await quick.jobs.list(TENANT)).records
    assert public_runpod_id(record) == job_id


async def test_a_bucket_of_the_clients_is_ignored_with_a_warning_and_not_kept(
    quick: LocalServer, world: JobsWorld
) -> None:
    asked = {"s3Config": {"bucketName": "b", "accessSecret": "very-secret"}}
    async with quick.client() as http:
        listed = await post(http, "runsync", json={"input": {"type": "list_models"}} | asked)
        made = await post(http, "run", json=PROMPT | asked)
        failed = await post(http, "run", json={"input": {"type": "nonsense"}} | asked)
        assert (await post(http, f"status-sync/{failed['id']}?wait=5000"))["status"] == "FAILED"
    assert listed["output"]["warnings"] == [S3_CONFIG_IGNORED]
    # The reply may come before its record on a busy machine.
    async with asyncio.timeout(30):
        while not (records := (await quick.jobs.list(TENANT)).records):  # noqa: ASYNC110 - the record is made beside the reply
            await asyncio.sleep(0.01)
    [record] = records
    assert public_runpod_id(record) == made["id"]
    assert record.notes is not None
    assert record.notes["warnings"] == [S3_CONFIG_IGNORED]
    saved = quick.dispatch.replies.saved(TENANT, failed["id"])
    assert saved is not None
    assert saved.sent is not None
    assert "very-secret" not in repr(record) + repr(saved)
