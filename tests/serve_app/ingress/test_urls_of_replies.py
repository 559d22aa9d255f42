"""URLs of jobs without a record: made for each reader, and kept nowhere."""

from __future__ import annotations

import json
from typing import Any

import pytest

from serve_app.links import Link
from serve_app.testing import TENANT, LocalServer
from storage.errors import StorageFailed
from storage.job_state import JobKind
from storage.jobs_testing import JobsWorld
from tests.serve_app.dispatch.test_webhooks import URL, Receiver, send_due, sender
from tests.serve_app.job_types.asking import trained

PNG = {"filename": "a.png", "size": 10}
UPLOAD = {"type": "create_upload", "training_name": "cats", "files": [PNG]}


async def test_each_read_of_a_job_has_urls_of_its_own(server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    made = 0
    presign_put = server.store.presign_put

    async def counted(key: str, **options: Any) -> str:
        nonlocal made
        made += 1
        return f"{await presign_put(key, **options)}&made={made}"

    monkeypatch.setattr(server.store, "presign_put", counted)
    async with server.client() as http:
        first = (await http.post("/v2/ep/runsync", json={"input": UPLOAD})).json()
        again = (await http.get(f"/v2/ep/status/{first['id']}")).json()
        streamed = (await http.get(f"/v2/ep/stream/{first['id']}")).json()

    [place], [later] = first["output"]["files"], again["output"]["files"]
    assert place["url"] != later["url"]
    assert {**place, "url": None} == {**later, "url": None}
    [chunk] = streamed["stream"]
    assert "://" in chunk["output"]["files"][0]["url"]
    reply = server.dispatch.replies.get(TENANT, first["id"])
    assert reply is not None
    assert reply.output is not None
    assert isinstance(reply.output["files"][0]["url"], Link)


async def test_a_webhook_is_noted_without_urls_and_told_with_them(server: LocalServer, world: JobsWorld) -> None:
    process_id, receiver = await trained(server), Receiver()
    async with server.client() as http:
        body = {"input": {"type": "download", "process_id": process_id}, "webhook": URL}
        answered = (await http.post("/v2/ep/runsync", json=body)).json()
    [noted] = await server.jobs.take_webhooks()
    assert "://" not in json.dumps(noted.body)
    assert noted.attempts == 1
    await server.jobs.settle_webhook(noted, delivered=False)

    world.clock.advance(3600)
    assert await send_due(sender(server, receiver)) == 1

    [told] = receiver.bodies
    assert told.pop("input") == body["input"]
    assert told == answered
    assert "://" in told["output"]["url"]


async def test_while_no_url_can_be_made_the_end_stays_to_be_told(server: LocalServer) -> None:
    process_id = await trained(server)
    async with server.client() as http:
        body = {"input": {"type": "download", "process_id": process_id}}
        job_id = (await http.post("/v2/ep/runsync", json=body)).json()["id"]
        for path in ("status", "stream"):
            server.store.fail("presign_get", StorageFailed("presign_get", 1, "connection"))
            refused = await http.get(f"/v2/ep/{path}/{job_id}")
            assert (refused.status_code, refused.json()["error_type"]) == (503, "storage_failed")
        streamed = (await http.get(f"/v2/ep/stream/{job_id}")).json()
        status = (await http.get(f"/v2/ep/status/{job_id}")).json()
    assert status["status"] == streamed["status"] == "COMPLETED"
    assert streamed["stream"] == [{"output": status["output"]}]
    assert await server.jobs.claim(JobKind.GENERATION, "d") == []
