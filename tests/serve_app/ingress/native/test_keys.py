"""Keys made over HTTP: who makes them, whom they speak for, when they end."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from serve_app.ingress.issued_keys import KnownKeys
from serve_app.testing import OTHER_KEY, LocalServer
from storage.errors import JobsUnavailable
from storage.jobs import Jobs, utc_now
from storage.jobs_testing import JobsWorld
from storage.key_rows import IssuedKey

KEY = IssuedKey("key_0123456789abcdef", "ada", "studio", "ab" * 32, utc_now())


async def made(server: LocalServer, **fields: Any) -> dict[str, Any]:
    async with server.client() as http:
        reply = await http.post("/v1/keys", json={"name": "studio"} | fields)
    assert reply.status_code == 201, reply.text
    key: dict[str, Any] = reply.json()
    return key


async def status_with(server: LocalServer, key: str, path: str = "/v1/generations") -> int:
    async with server.client(key) as http:
        return (await http.get(path)).status_code


async def test_a_key_speaks_for_its_tenant_until_it_is_revoked(server: LocalServer) -> None:
    key = await made(server, tenant="ada")
    assert await status_with(server, key["key"]) == 200
    async with server.client(key["key"]) as http:
        body = {"prompt": "a red circle"}
        assert (await http.post("/v1/generations", json=body)).status_code == 202
    [record] = (await server.jobs.list("ada")).records
    assert record.tenant == "ada"
    async with server.client() as http:
        revoked = await http.delete(f"/v1/keys/{key['id']}")
    assert revoked.json()["revoked_at"] is not None
    assert await status_with(server, key["key"]) == 401


async def test_a_key_is_shown_once_and_stored_as_its_digest_only(server: LocalServer, world: JobsWorld) -> None:
    key = await made(server)
    assert (key["tenant"], key["revoked_at"]) == ("matt", None)
    async with server.client() as http:
        listed = await http.get("/v1/keys")
    assert listed.json()["items"] == [{name: value for name, value in key.items() if name != "key"}]
    assert key["key"] not in str(world.jobs.issued_keys(valid_only=False))


async def test_only_the_instances_own_key_manages_keys(server: LocalServer) -> None:
    key = await made(server)
    for other in (OTHER_KEY, key["key"]):
        async with server.client(other) as http:
            replies = [
                await http.post("/v1/keys", json={"name": "x"}),
                await http.get("/v1/keys"),
                await http.delete(f"/v1/keys/{key['id']}"),
            ]
        assert [(reply.status_code, reply.json()["code"]) for reply in replies] == [(403, "keys_not_allowed")] * 3


@pytest.mark.parametrize("key_id", ["key_0000000000000000", "x"])
async def test_a_key_that_is_not_there_cannot_be_revoked(server: LocalServer, key_id: str) -> None:
    async with server.client() as http:
        reply = await http.delete(f"/v1/keys/{key_id}")
    assert (reply.status_code, reply.json()["code"]) == (404, "key_not_found")


@pytest.mark.parametrize(
    "body", [{}, {"name": " "}, {"name": "x", "tenant": "a/b"}, {"name": "x", "tenant": "results"}]
)
async def test_a_key_without_a_name_or_for_no_tenant_is_not_made(server: LocalServer, body: dict[str, Any]) -> None:
    async with server.client() as http:
        assert (await http.post("/v1/keys", json=body)).status_code == 400
        assert (await http.get("/v1/keys")).json()["items"] == []


def test_adding_and_revoking_again_change_nothing(world: JobsWorld) -> None:
    first = world.jobs.add_key("key_1", "ada", "a", "0" * 64)
    assert world.jobs.add_key("key_1", "ada", "a", "0" * 64) == first
    revoked = world.jobs.revoke_key("key_1")
    world.clock.advance(5)
    assert world.jobs.revoke_key("key_1") == revoked
    assert world.jobs.issued_keys(valid_only=True) == []


async def test_a_key_of_the_settings_costs_no_look_at_the_database(
    server: LocalServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[str] = []
    call = server.jobs.call

    async def counted(method: Any, *args: Any, **kwargs: Any) -> Any:
        looks.append(method.__name__)
        return await call(method, *args, **kwargs)

    monkeypatch.setattr(server.jobs, "call", counted)
    assert await status_with(server, OTHER_KEY, "/v1/nothing") == 404
    assert Jobs.issued_keys.__name__ not in looks


class Look:
    """Counts looks; each lasts until `gate` is set."""

    def __init__(self) -> None:
        self.count, self.now, self.gate = 0, 100.0, asyncio.Event()
        self.keys: Sequence[IssuedKey] = [KEY]
        self.gate.set()

    async def __call__(self) -> Sequence[IssuedKey]:
        self.count += 1
        keys = self.keys
        await self.gate.wait()
        return keys


async def test_requests_share_a_look_and_its_answer_holds_for_two_seconds() -> None:
    look = Look()
    known = KnownKeys(look, now=lambda: look.now)
    assert await asyncio.gather(*(known.find(KEY.key_sha256) for _ in range(5))) == [KEY] * 5
    look.now += 1.9
    look.keys = []
    assert await known.find(KEY.key_sha256) == KEY
    assert look.count == 1
    look.now += 0.1
    assert await known.find(KEY.key_sha256) is None
    assert look.count == 2


async def test_a_look_that_lasts_longer_than_its_answer_holds_still_answers() -> None:
    look = Look()
    look.gate.clear()
    known = KnownKeys(look, now=lambda: look.now)
    asked = asyncio.create_task(known.find(KEY.key_sha256))
    while look.count == 0:  # noqa: ASYNC110 the look has no event for its beginning
        await asyncio.sleep(0)
    look.now += 10
    look.gate.set()
    assert await asked == KEY
    assert look.count == 1


async def test_what_was_read_before_a_change_is_not_believed_after_it() -> None:
    look = Look()
    look.gate.clear()
    known = KnownKeys(look, now=lambda: look.now)
    asked = asyncio.create_task(known.find(KEY.key_sha256))
    while look.count == 0:  # noqa: ASYNC110 the look has no event for its beginning
        await asyncio.sleep(0)
    look.keys = []
    known.forget()
    look.gate.set()
    assert await asked is None
    assert look.count == 2


async def test_where_the_keys_cannot_be_looked_at_nobody_is_let_in_by_an_old_answer() -> None:
    look = Look()

    async def load() -> Sequence[IssuedKey]:
        if look.now > 100:
            raise JobsUnavailable("call")
        return await look()

    known = KnownKeys(load, now=lambda: look.now)
    assert await known.find(KEY.key_sha256) == KEY
    look.now += 2
    with pytest.raises(JobsUnavailable):
        await known.find(KEY.key_sha256)
