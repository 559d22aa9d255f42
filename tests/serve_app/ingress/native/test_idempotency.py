"""Idempotency-Key on the routes of /v1."""

import asyncio
from base64 import b64decode
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
import sqlalchemy as sa

from serve_app.testing import OTHER_KEY, TENANT, LocalServer, keys_of, picture_base64
from storage.jobs_testing import JobsWorld
from storage.records_tables import replies

BODY = {"prompt": "a red circle"}
KEY = {"Idempotency-Key": "k-1"}
PICTURE = b64decode(picture_base64())
WITHOUT_RENEWAL = {"/v1/generations/{generation_id}/cancel", "/v1/images/generations"}
"""One never has the URLs that its schema allows, of the other no reply is kept."""


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


# --- replies that hold URLs

UPLOAD = {"name": "cats", "files": [{"filename": "1.png", "size_bytes": 10}, {"filename": "a b.txt", "size_bytes": 3}]}
IMPORT = {"name": "paper", "filename": "paper.safetensors", "size_bytes": 100}
WITH_URLS = [
    ("/v1/generations", {**BODY, "num_images": 1}, {"wait": "20"}),
    ("/v1/uploads", UPLOAD, {}),
    ("/v1/loras/import", IMPORT, {}),
]


def urls_of(value: Any) -> Iterator[str]:
    if isinstance(value, list):
        for item in value:
            yield from urls_of(item)
    if isinstance(value, dict):
        for name, item in value.items():
            if name == "url":
                yield item
            else:
                yield from urls_of(item)


def without_what_a_renewal_changes(value: Any) -> Any:
    if isinstance(value, list):
        return [without_what_a_renewal_changes(item) for item in value]
    if isinstance(value, dict):
        return {
            name: without_what_a_renewal_changes(item)
            for name, item in value.items()
            if name not in {"url", "expires_at"}
        }
    return value


@pytest.mark.parametrize(("path", "body", "query"), WITH_URLS)
async def test_a_reply_is_told_again_with_urls_made_anew_and_none_is_kept(
    working: LocalServer, world: JobsWorld, path: str, body: dict[str, Any], query: dict[str, str]
) -> None:
    async with working.client() as http:
        first = (await http.post(path, json=body, params=query, headers=KEY)).json()
        with world.records.read("look") as tx:
            [kept] = tx._connection.execute(sa.select(replies.c.body)).scalars()
        world.clock.advance(7200)
        second = await http.post(path, json=body, params=query, headers=KEY)
    assert second.headers["idempotent-replayed"] == "true"
    again = second.json()
    assert without_what_a_renewal_changes(again) == without_what_a_renewal_changes(first)
    old, new = list(urls_of(first)), list(urls_of(again))
    assert [urlsplit(url).path for url in new] == [urlsplit(url).path for url in old]
    assert new
    assert "http" not in kept


async def test_the_urls_of_an_upload_that_is_told_again_say_when_they_end(
    server: LocalServer, world: JobsWorld
) -> None:
    async with server.client() as http:
        for path, body in (("/v1/uploads", UPLOAD), ("/v1/loras/import", IMPORT)):
            headers = {"Idempotency-Key": path}
            before = (await http.post(path, json=body, headers=headers)).json()
            world.clock.advance(7200)
            after = (await http.post(path, json=body, headers=headers)).json()
            old, new = [reply.get("expires_at") or reply["upload"]["expires_at"] for reply in (before, after)]
            assert old < new
            assert new.endswith("Z")


async def test_an_upload_that_is_told_again_can_be_finished(server: LocalServer, world: JobsWorld) -> None:
    body = {"name": "notes", "files": [{"filename": "1.png", "size_bytes": len(PICTURE)}]}
    async with server.client() as http:
        upload = (await http.post("/v1/uploads", json=body, headers=KEY)).json()
        world.clock.advance(7200)
        again = (await http.post("/v1/uploads", json=body, headers=KEY)).json()
        assert again["id"] == upload["id"]
        await server.store.put(keys_of(TENANT).staging_file(again["id"], "1.png"), PICTURE)
        assert (await http.post(f"/v1/uploads/{again['id']}/finish")).status_code == 201


def test_no_other_route_keeps_replies_that_may_hold_urls(server: LocalServer) -> None:
    document = server.app.openapi()

    def holds_url(schema: Any, seen: frozenset[str] = frozenset()) -> bool:
        if isinstance(schema, list):
            return any(holds_url(item, seen) for item in schema)
        if not isinstance(schema, dict):
            return False
        name = str(schema.get("$ref", "")).rsplit("/", 1)[-1]
        if name and name not in seen:
            return holds_url(document["components"]["schemas"][name], seen | {name})
        return "url" in schema.get("properties", {}) or any(holds_url(item, seen) for item in schema.values())

    found = {
        path
        for path, methods in document["paths"].items()
        if path.startswith("/v1/") and "post" in methods and holds_url(methods["post"]["responses"])
    }
    assert found == {path for path, _, _ in WITH_URLS} | WITHOUT_RENEWAL
