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


class Failing(Look):
    """Fails while `is_away`."""

    def __init__(self) -> None:
        super().__init__()
        self.is_away = False

    async def __call__(self) -> Sequence[IssuedKey]:
        if self.is_away:
            self.count += 1
            raise JobsUnavailable("call")
        return await super().__call__()


async def test_while_the_keys_cannot_be_looked_at_a_known_one_is_taken_for_half_a_minute() -> None:
    look = Failing()
    known = KnownKeys(look, now=lambda: look.now)
    assert await known.find(KEY.key_sha256) == KEY
    look.is_away = True
    look.now += 29.9
    assert await known.find(KEY.key_sha256) == KEY
    look.now += 0.1
    with pytest.raises(JobsUnavailable):
        await known.find(KEY.key_sha256)


async def test_while_the_keys_cannot_be_looked_at_others_are_neither_taken_nor_refused() -> None:
    look = Failing()
    known = KnownKeys(look, now=lambda: look.now)
    assert await known.find("cd" * 32) is None
    look.is_away = True
    look.now += 2
    for _ in range(5):
        with pytest.raises(JobsUnavailable):
            await known.find("cd" * 32)
    assert look.count == 2, "those after the first are not to wait for a look of their own"
    look.is_away = False
    look.now += 1
    assert await known.find("cd" * 32) is None


async def test_a_look_that_does_not_end_is_given_up() -> None:
    look = Look()
    look.gate.clear()
    with pytest.raises(JobsUnavailable):
        await KnownKeys(look, look_s_max=0.001, now=lambda: look.now).find(KEY.key_sha256)


async def test_a_key_that_was_revoked_here_is_not_taken_from_memory() -> None:
    look = Failing()
    known = KnownKeys(look, now=lambda: look.now)
    assert await known.find(KEY.key_sha256) == KEY
    known.forget()
    look.is_away = True
    with pytest.raises(JobsUnavailable):
        await known.find(KEY.key_sha256)


async def test_the_use_of_a_key_is_shown_and_noted_once_in_five_minutes(server: LocalServer, world: JobsWorld) -> None:
    key = await made(server)
    unused = await made(server, name="unused")
    for _ in range(3):
        assert await status_with(server, key["key"]) == 200
    async with server.client() as http:
        used: dict[str, Any] = {}
        for _ in range(1000):
            used = {item["id"]: item["last_used_at"] for item in (await http.get("/v1/keys")).json()["items"]}
            if used[key["id"]] is not None:
                break
    assert used == {key["id"]: world.clock.now.isoformat().replace("+00:00", "Z"), unused["id"]: None}


async def test_uses_are_noted_in_the_background_and_again_after_a_failure() -> None:
    look, noted, errors = Look(), [], [JobsUnavailable("call")]

    async def note(key_ids: Sequence[str]) -> None:
        noted.append(list(key_ids))
        if errors:
            raise errors.pop()

    known = KnownKeys(look, note, now=lambda: look.now)
    for seconds, times in ((0, 1), (1, 2), (1, 2), (298, 2), (1, 3)):
        look.now += seconds
        await known.find(KEY.key_sha256)
        for _ in range(3):
            await asyncio.sleep(0)
        assert len(noted) == times, (seconds, times)
    assert noted == [[KEY.id]] * 3
