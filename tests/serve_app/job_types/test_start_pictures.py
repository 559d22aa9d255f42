"""`init_image`, `mask` and `strength` of a generation: what is taken, stored and refused."""

import hashlib
from base64 import b64decode
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from serve_app.outbound import Outbound
from serve_app.testing import BUCKET, OTHER_KEY, LocalServer, LocalValidation, keys_of, local_server, picture_base64
from storage.errors import JobsUnavailable, StorageFailed
from storage.jobs_testing import JobsWorld
from tests.serve_app.job_types.asking import cleanup_failures, done, refused

PICTURE, MASK = picture_base64(8, 4), picture_base64(8, 4, color="white")
INPUT = {"prompt": "a cat", "wait": False}


async def request_of(server: LocalServer, **fields: Any) -> dict[str, Any]:
    """The record's request of a generation that was accepted."""
    output = await done(server, INPUT | fields)
    return (await server.jobs.get(output["process_id"])).request


@pytest.mark.parametrize("text", [PICTURE, f"data:image/png;base64,{PICTURE}"])
async def test_pictures_are_stored_with_the_process_and_the_record_has_their_keys(
    server: LocalServer, text: str
) -> None:
    output = await done(server, {**INPUT, "init_image": text, "mask": MASK, "strength": 0.5})
    request = (await server.jobs.get(output["process_id"])).request
    start, sha256 = request["start"], hashlib.sha256(b64decode(PICTURE)).hexdigest()
    keys = keys_of("matt")
    assert start["init_image"] == {
        "key": keys.input_picture(output["process_id"], "init_image", sha256, "png"),
        "sha256": sha256,
    }
    assert start["strength"] == 0.5
    assert await server.store.get(start["init_image"]["key"]) == b64decode(PICTURE)
    assert await server.store.get(start["mask"]["key"]) == b64decode(MASK)
    assert PICTURE not in str(request)


async def test_a_strength_that_is_not_named_is_the_engines_own(server: LocalServer) -> None:
    assert (await request_of(server, init_image=PICTURE))["start"]["strength"] == 0.8
    assert (await request_of(server))["start"] is None


async def test_an_earlier_result_is_named_by_its_key(server: LocalServer) -> None:
    key = keys_of("matt").image("gen_0123456789ab", 0, "0" * 64, "png")
    await server.store.put(key, b64decode(PICTURE))
    for text in (key, f"s3://{BUCKET}/{key}"):
        start = (await request_of(server, init_image=text))["start"]
        assert await server.store.get(start["init_image"]["key"]) == b64decode(PICTURE)


async def test_what_is_wrong_is_named_all_at_once(server: LocalServer) -> None:
    own = keys_of("matt").image("gen_0123456789ab", 0, "0" * 64, "png")
    await server.store.put(own, b64decode(PICTURE))
    for init_image, code in (
        ("not base64!", "invalid_value"),
        ("YWJj", "invalid_value"),
        (own, "not_found"),
        ("s3://another-bucket/x.png", "not_found"),
        ("raylora/matt2/processes/gen_0123456789ab/images/missing.png", "not_found"),
        ("http://example.com/1.png", "invalid_value"),
    ):
        output = await refused(server, {**INPUT, "init_image": init_image, "mask": "YWJj", "num_images": 0}, OTHER_KEY)
        found = [(problem["path"], problem["code"]) for problem in output["validation_errors"]]
        assert found[1:] == [("init_image", code), ("mask", "invalid_value")], init_image
        assert found[0][0] == "num_images"
    assert [key for key in sorted(server.store.keys()) if "/inputs/" in key] == []


@pytest.mark.parametrize(
    ("fields", "paths"),
    [
        ({"mask": MASK, "strength": 0.5}, ["mask", "strength"]),
        ({"init_image": PICTURE, "strength": 0.0}, ["strength"]),
        ({"init_image": PICTURE, "strength": 1.5}, ["strength"]),
        ({"init_image": 7}, ["init_image"]),
        ({"config": {"job": "generate"}, "init_image": PICTURE}, ["init_image"]),
    ],
)
async def test_what_does_not_go_together_is_refused_by_name(
    server: LocalServer, fields: dict[str, Any], paths: list[str]
) -> None:
    output = await refused(server, INPUT | fields)
    assert [problem["path"] for problem in output["validation_errors"]] == paths


async def test_a_picture_by_url_goes_where_uploads_may_go(world: JobsWorld) -> None:
    async def resolve(host: str, port: int) -> list[str]:
        return ["93.184.216.34"]

    async def arriving() -> AsyncIterator[bytes]:
        yield b64decode(PICTURE)

    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, content=arriving()) if request.url.path == "/1" else httpx.Response(404)

    server = local_server(world.jobs, world.clock)
    outbound = Outbound(any_address=False, timeout_s=5, resolve=resolve, transport=httpx.MockTransport(answer))
    validation = LocalValidation(server.store, world.clock, outbound)
    server = local_server(world.jobs, world.clock, store=server.store, validation=validation)
    request = await request_of(server, init_image="https://example.com/1")
    assert await server.services.store.get(request["start"]["init_image"]["key"]) == b64decode(PICTURE)
    output = await refused(server, {**INPUT, "init_image": "https://example.com/2"})
    assert [problem["code"] for problem in output["validation_errors"]] == ["unavailable"]
    output = await refused(server, {**INPUT, "init_image": "https://a..b/1"})
    assert [(problem["path"], problem["code"]) for problem in output["validation_errors"]] == [
        ("init_image", "invalid_value")
    ]


async def test_a_generation_that_is_refused_later_leaves_no_pictures(server: LocalServer) -> None:
    await refused(server, {**INPUT, "init_image": PICTURE, "lora": "nobody"})
    assert list(server.store.keys()) == []


async def test_pictures_that_cannot_be_removed_are_counted_and_the_refusal_stays_what_it_was(
    server: LocalServer,
) -> None:
    before = cleanup_failures().get("start_pictures", 0)
    server.store.fail("delete_many", StorageFailed("delete_many", 4, "connection"))
    output = await refused(server, {**INPUT, "init_image": PICTURE, "loras": [{"id": "train_000000000000"}]})
    assert output["error_type"] != "storage_failed"
    assert cleanup_failures()["start_pictures"] == before + 1


async def test_pictures_stay_where_the_record_may_have_been_made(
    server: LocalServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def unavailable(*_: Any, **__: Any) -> None:
        raise JobsUnavailable("create")

    monkeypatch.setattr(server.jobs, "create", unavailable)
    await refused(server, {**INPUT, "init_image": PICTURE})
    assert len(server.store.keys()) == 1


async def test_the_same_request_again_leaves_no_second_copy(server: LocalServer) -> None:
    body = {"prompt": "a cat", "init_image": PICTURE}
    headers = {"Idempotency-Key": "k"}
    async with server.client() as http:
        first = await http.post("/v1/generations", json=body, headers=headers)
        await http.post("/v2/ep/run", json={"input": INPUT | body}, headers=headers)
    assert first.status_code == 202
    assert len([key for key in sorted(server.store.keys()) if first.json()["id"] in key]) == 1


async def test_a_webhook_is_told_the_key_and_not_the_bytes(server: LocalServer, world: JobsWorld) -> None:
    body = {"input": {"prompt": "a cat", "init_image": PICTURE}, "webhook": "https://example.com/hook"}
    async with server.client() as http:
        reply = await http.post("/v2/ep/run", json=body)
    record = await server.jobs.get_by_runpod_id(reply.json()["id"], tenant="matt")
    await server.jobs.request_cancel(record.id, tenant="matt")
    [webhook] = await server.jobs.take_webhooks()
    assert webhook.input["init_image"] == record.request["start"]["init_image"]["key"]


async def test_v1_takes_them_too_and_shows_the_keys(server: LocalServer) -> None:
    large = picture_base64(64, 64, kind="BMP")
    body = {"prompt": "a cat", "init_image": large, "mask": MASK, "strength": 0.25}
    async with server.client() as http:
        reply = await http.post("/v1/generations", json=body)
        refusal = await http.post("/v1/generations", json={"prompt": "a cat", "mask": MASK, "strength": 2})
    assert reply.status_code == 202, reply.text
    spec = reply.json()["spec"]
    assert spec["init_image"].endswith(".bmp")
    assert await server.store.get(spec["mask"]) == b64decode(MASK)
    assert spec["strength"] == 0.25
    assert refusal.status_code == 400


async def test_a_body_with_a_picture_may_be_as_large_as_a_job(server: LocalServer) -> None:
    body = {"prompt": "a cat", "init_image": "A" * (2 * 1024 * 1024)}
    async with server.client() as http:
        assert (await http.post("/v1/generations", json=body)).status_code == 400
        body["init_image"] *= 6
        assert (await http.post("/v1/generations", json=body)).status_code == 413
