"""Idempotency-Key on the routes of /v1."""

import asyncio
from typing import Any

import pytest

from serve_app.testing import OTHER_KEY, LocalServer
from storage.jobs_testing import JobsWorld

BODY = {"prompt": "a red circle"}
KEY = {"Idempotency-Key": "k-1"}


async def send(server: LocalServer, key: str | None = None, **options: Any) -> Any:
    async with server.client(*([] if key is None else [key])) as http:
        return await http.post("/v1/generations", **{"json": BODY, "headers": KEY, **options})


async def test_the_same_request_gets_the_first_reply_again(server: LocalServer) -> None:
    first, second = await send(server), await send(server)
    assert (second.status_code, second.json()) == (first.status_code, first.json())
    assert second.headers["idempotent-replayed"] == "true"
    assert "idempotent-replayed" not in first.headers


@pytest.mark.parametrize("other", [{"json": {"prompt": "another"}}, {"params": {"wait": "0"}}])
async def test_another_request_with_the_key_is_refused(server: LocalServer, other: dict[str, Any]) -> None:
    await send(server)
    reply = await send(server, **other)
    assert (reply.status_code, reply.json()["code"]) == (422, "idempotency_conflict")


async def test_a_key_belongs_to_its_tenant(server: LocalServer) -> None:
    mine, theirs = await send(server), await send(server, OTHER_KEY, json={"prompt": "another"})
    assert theirs.status_code == 202
    assert theirs.json()["id"] != mine.json()["id"]


async def test_while_the_first_is_at_work_the_second_is_told_so(server: LocalServer) -> None:
    begun, gate = asyncio.Event(), asyncio.Event()
    validate = server.services.validation.generation

    async def slow(*asked: Any) -> Any:
        begun.set()
        await gate.wait()
        return await validate(*asked)

    server.services.validation.generation = slow  # type: ignore[method-assign]
    first = asyncio.create_task(send(server))
    await begun.wait()
    second = await send(server)
    gate.set()
    assert (second.status_code, second.json()["code"]) == (409, "idempotency_in_flight")
    assert second.headers["retry-after"] == "1"
    assert (await first).status_code == 202


async def test_a_request_that_failed_may_be_sent_again(server: LocalServer) -> None:
    body = {"prompt": "a", "loras": [{"id": "lora_0123456789ab"}]}
    assert [(await send(server, json=body)).json()["code"] for _ in range(2)] == ["lora_not_usable"] * 2
    assert (await send(server)).status_code == 202


async def test_a_key_is_forgotten_after_a_day(server: LocalServer, world: JobsWorld) -> None:
    first = (await send(server)).json()["id"]
    world.clock.advance(24 * 3600 + 1)
    assert (await send(server)).json()["id"] != first


async def test_a_reply_outlives_a_restart_of_the_records(server: LocalServer, world: JobsWorld) -> None:
    from serve_app.testing import local_server

    first = (await send(server)).json()
    world.restart()
    again = await send(local_server(world.jobs, world.clock))
    assert again.json() == first


@pytest.mark.parametrize("key", ["", " ", "x" * 256, "ä"])
async def test_a_key_that_could_not_be_kept_is_refused(server: LocalServer, key: str) -> None:
    reply = await send(server, headers={"Idempotency-Key": key.encode()})
    assert (reply.status_code, reply.json()["code"]) == (400, "body_invalid")
