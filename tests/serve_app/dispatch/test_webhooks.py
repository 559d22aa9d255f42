"""Webhooks: the status object and the input, signed, to every final state, and never at the job's expense."""

import asyncio
import base64
import json
from collections.abc import Mapping
from typing import Any

import pytest
from pydantic import SecretStr, ValidationError
from standardwebhooks.webhooks import Webhook, WebhookVerificationError

from serve_app.dispatch.webhooks import AT_ONCE_MAX, AT_ONCE_OF_TENANT_MAX, WebhookSender
from serve_app.errors import OutboundFailed
from serve_app.settings import Settings, SettingsIncomplete, WebhookSettings
from serve_app.testing import KEY, OTHER_KEY, LocalServer, local_server
from serve_app.webhook_secrets import WebhookSecrets
from storage.counters import WEBHOOK_FAILURES, Tally
from storage.errors import JobsUnavailable, StorageFailed
from storage.job_state import JobKind
from storage.jobs import utc_now
from storage.jobs_testing import JobsWorld

OWNER = "dispatcher-1"
URL = "https://example.com/hook"
SECRET = b"a secret of at least 24 bytes"
SECRETS = WebhookSecrets(b"root", {"matt": SECRET})
PROMPT = {"prompt": "a red circle"}


class Receiver:
    """Keeps what arrives; `failures` are raised first, one for each POST."""

    def __init__(self, *failures: Exception) -> None:
        self.failures = list(failures)
        self.received: list[tuple[str, bytes, Mapping[str, str]]] = []

    async def post(self, url: str, content: bytes, headers: Mapping[str, str]) -> None:
        if self.failures:
            raise self.failures.pop(0)
        self.received.append((url, content, headers))

    @property
    def bodies(self) -> list[dict[str, Any]]:
        return [json.loads(content) for _, content, _ in self.received]


def sender(server: LocalServer, receiver: Any, secrets: WebhookSecrets = SECRETS, **options: Any) -> WebhookSender:
    options = {"counters": Tally(), **options}
    return WebhookSender(server.jobs, server.services, receiver, secrets=secrets, **options)


async def send_due(sender: WebhookSender) -> int:
    """How many were tried."""
    tried = await sender.start_due()
    await asyncio.gather(*tried)
    return len(tried)


async def submit(server: LocalServer, client_key: str = KEY, **body: Any) -> str:
    async with server.client(client_key) as http:
        reply = await http.post("/v2/ep/run", json={"input": PROMPT, "webhook": URL, **body})
    assert reply.status_code == 200, reply.text
    return str(reply.json()["id"])


async def completed(server: LocalServer) -> str:
    job_id = await submit(server)
    [record] = await server.jobs.claim(JobKind.GENERATION, OWNER)
    await server.jobs.start(record.id, OWNER)
    key = f"raylora/matt/processes/{record.id}/images/1.png"
    await server.jobs.complete(record.id, OWNER, {"images": [{"key": key, "filename": "1.png"}]})
    return job_id


async def test_the_end_of_a_job_is_told_with_its_input_and_urls(server: LocalServer) -> None:
    receiver = Receiver()
    other = {"prompt": "a blue circle"}
    job_id = await submit(server, input=other)
    assert await send_due(sender(server, receiver)) == 0
    async with server.client() as http:
        await http.post(f"/v2/ep/cancel/{job_id}")
    await completed(server)
    assert await send_due(sender(server, receiver)) == 2
    cancelled, done = sorted(receiver.bodies, key=lambda body: body["status"] == "COMPLETED")
    assert (cancelled["id"], cancelled["status"], cancelled["input"]) == (job_id, "CANCELLED", other)
    assert done["input"] == PROMPT
    assert done["output"]["images"][0]["url"].startswith("http")
    assert [url for url, _, _ in receiver.received] == [URL, URL]


async def test_the_signature_is_one_that_the_scheme_verifies(world: JobsWorld) -> None:
    server = local_server(world.jobs, world.clock)
    world.clock.now = utc_now()
    receiver = Receiver()
    await completed(server)
    await send_due(sender(server, receiver))
    [(_, content, headers)] = receiver.received
    verifier = Webhook(f"whsec_{base64.b64encode(SECRET).decode()}")
    assert verifier.verify(content, dict(headers))["status"] == "COMPLETED"
    with pytest.raises(WebhookVerificationError):
        verifier.verify(content + b" ", dict(headers))


async def test_a_job_without_a_record_and_an_accepted_one_are_told_too(server: LocalServer) -> None:
    receiver = Receiver()
    await submit(server, input={"type": "health"})
    await submit(server, input={"type": "nonsense"})
    await submit(server, input={**PROMPT, "wait": False})
    await send_due(sender(server, receiver))
    told = {body["input"].get("type"): body for body in receiver.bodies}
    assert told["health"]["status"] == "COMPLETED"
    assert (told["nonsense"]["status"], told["nonsense"]["error"]) == ("FAILED", "Unknown job type: nonsense")
    assert told[None]["output"]["process_id"].startswith("gen_")
    await server.jobs.claim(JobKind.GENERATION, OWNER)
    assert await send_due(sender(server, receiver)) == 0


async def test_a_receiver_that_fails_is_tried_again_under_the_same_id(server: LocalServer, world: JobsWorld) -> None:
    receiver = Receiver(OutboundFailed("status 500"), OutboundFailed("timeout"))
    await completed(server)
    for wait_s in (10, 20, 40):
        assert await send_due(sender(server, receiver)) == 1
        assert await send_due(sender(server, receiver)) == 0
        world.clock.advance(wait_s)
    assert len(receiver.received) == 1
    assert await send_due(sender(server, receiver)) == 0


async def test_what_nobody_expected_of_one_webhook_is_a_failed_attempt_of_that_one_only(
    server: LocalServer, world: JobsWorld, caplog: pytest.LogCaptureFixture
) -> None:
    counters = Tally()
    receiver = Receiver(*[UnicodeError("a label of secret.example.com is empty")] * 4)
    await completed(server)
    for wait_s in (10, 20, 40):
        assert await send_due(sender(server, receiver, counters=counters)) == 1
        world.clock.advance(wait_s)
    assert await send_due(sender(server, receiver)) == 0
    assert counters.counts() == {WEBHOOK_FAILURES: {"UnicodeError": 3}}
    assert "was given up" in caplog.text
    assert "secret.example.com" not in caplog.text


async def test_the_sender_outlives_an_outcome_that_cannot_be_noted(server: LocalServer) -> None:
    async def broken(*_: Any, **__: Any) -> bool:
        raise RuntimeError

    server.jobs.settle_webhook = broken  # type: ignore[method-assign]
    await completed(server)
    assert await send_due(sender(server, Receiver())) == 1


async def test_a_receiver_that_never_answers_changes_nothing_for_the_job(
    server: LocalServer, world: JobsWorld, caplog: pytest.LogCaptureFixture
) -> None:
    receiver = Receiver(*[OutboundFailed("timeout")] * 3)
    job_id = await completed(server)
    for _ in range(4):
        await send_due(sender(server, receiver))
        world.clock.advance(100)
    assert receiver.received == []
    assert "was given up" in caplog.text
    assert URL not in caplog.text
    async with server.client() as http:
        assert (await http.get(f"/v2/ep/status/{job_id}")).json()["status"] == "COMPLETED"


class BlackHole(Receiver):
    """Never answers at addresses with `hole` in them; `most` is how many waited for it at once."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting = self.most = 0
        self.arrived = asyncio.Event()

    async def post(self, url: str, content: bytes, headers: Mapping[str, str]) -> None:
        if "hole" not in url:
            await super().post(url, content, headers)
            self.arrived.set()
            return
        self.waiting += 1
        self.most = max(self.most, self.waiting)
        try:
            await asyncio.Event().wait()
        finally:
            self.waiting -= 1


async def due(server: LocalServer, tenant: str, count: int, url: str = URL) -> None:
    for _ in range(count):
        await server.jobs.add_webhook(tenant=tenant, url=url, input={}, body={"status": "COMPLETED", "of": tenant})


async def test_receivers_that_never_answer_hold_up_no_other_tenant(server: LocalServer, world: JobsWorld) -> None:
    receiver = BlackHole()
    await due(server, "greedy", 3 * AT_ONCE_MAX, "https://hole.example.com/")
    world.clock.advance(1)
    running = asyncio.create_task(sender(server, receiver, poll_s=0.0).run())
    async with asyncio.timeout(20):
        while receiver.waiting < AT_ONCE_OF_TENANT_MAX:
            await server.jobs.counts()
        for tenant in ("matt", "matt2"):
            await due(server, tenant, 1)
            await receiver.arrived.wait()
            receiver.arrived.clear()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert [body["of"] for body in receiver.bodies] == ["matt", "matt2"]
    assert (receiver.most, receiver.waiting) == (AT_ONCE_OF_TENANT_MAX, 0)


async def test_a_tenant_gets_its_places_back(server: LocalServer) -> None:
    receiver = Receiver(*[OutboundFailed("timeout")] * 2)
    await due(server, "matt", 2 * AT_ONCE_OF_TENANT_MAX + 1)
    one = sender(server, receiver)
    assert [await send_due(one) for _ in range(4)] == [AT_ONCE_OF_TENANT_MAX, AT_ONCE_OF_TENANT_MAX, 1, 0]
    assert len(receiver.received) == 2 * AT_ONCE_OF_TENANT_MAX - 1


async def test_no_more_are_sent_at_once_than_there_are_places_and_each_that_ends_makes_room(
    server: LocalServer,
) -> None:
    gates: list[asyncio.Event] = []

    class Slow(Receiver):
        async def post(self, url: str, content: bytes, headers: Mapping[str, str]) -> None:
            gates.append(gate := asyncio.Event())
            await gate.wait()

    one = sender(server, Slow())
    for tenant in range(AT_ONCE_MAX // AT_ONCE_OF_TENANT_MAX + 1):
        await due(server, f"tenant{tenant}", AT_ONCE_OF_TENANT_MAX)
    first = await one.start_due()
    assert len(first) == AT_ONCE_MAX
    assert await one.start_due() == []
    await asyncio.sleep(0)
    gates[0].set()
    await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
    [next_one] = await one.start_due()
    await asyncio.sleep(0)
    for gate in gates:
        gate.set()
    await asyncio.gather(*first, next_one)


async def test_a_store_that_makes_no_urls_is_tried_again_later(server: LocalServer, world: JobsWorld) -> None:
    receiver = Receiver()
    await completed(server)
    server.store.fail("presign_get", StorageFailed("presign_get", 4, "connection"))
    await send_due(sender(server, receiver))
    assert receiver.received == []
    world.clock.advance(10)
    await send_due(sender(server, receiver))
    assert len(receiver.received) == 1


async def test_a_webhook_that_cannot_be_noted_does_not_fail_its_job(server: LocalServer) -> None:
    async def away(**_: Any) -> None:
        raise JobsUnavailable("add_webhook")

    server.jobs.add_webhook = away  # type: ignore[method-assign]
    job_id = await submit(server, input={"type": "health"})
    async with server.client() as http:
        assert (await http.get(f"/v2/ep/status/{job_id}")).json()["status"] == "COMPLETED"


async def test_the_sender_goes_on_when_the_records_were_away(server: LocalServer) -> None:
    receiver = Receiver()
    await completed(server)
    take, slept = server.jobs.take_webhooks, asyncio.Event()
    calls = 0

    async def flaky(limit: int, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise JobsUnavailable("take_webhooks")
        return await take(limit, **options)

    async def sleep(_: float) -> None:
        if receiver.received:
            slept.set()
        await asyncio.sleep(0)

    server.jobs.take_webhooks = flaky  # type: ignore[method-assign]
    running = asyncio.create_task(sender(server, receiver, sleep=sleep).run())
    await slept.wait()
    running.cancel()
    assert len(receiver.received) == 1


async def secret_of(server: LocalServer, key: str) -> str:
    async with server.client(key) as http:
        reply = await http.get("/v1/webhooks/secret")
    assert (reply.status_code, reply.headers["cache-control"]) == (200, "no-store")
    return str(reply.json()["secret"])


async def test_each_tenant_verifies_with_the_secret_that_it_reads_and_with_no_other(world: JobsWorld) -> None:
    server = local_server(world.jobs, world.clock)
    world.clock.now = utc_now()
    receiver = Receiver()
    await submit(server, input={"type": "health"})
    async with server.client(OTHER_KEY) as http:
        await http.post("/v2/ep/run", json={"input": {"type": "health", "of": "other"}, "webhook": URL})
    await send_due(sender(server, receiver, server.services.webhook_secrets))
    mine, others = Webhook(await secret_of(server, KEY)), Webhook(await secret_of(server, OTHER_KEY))
    assert len(receiver.received) == 2
    for _, content, headers in receiver.received:
        verifies, refuses = (others, mine) if b"other" in content else (mine, others)
        assert verifies.verify(content, dict(headers))["status"] == "COMPLETED"
        with pytest.raises(WebhookVerificationError):
            refuses.verify(content, dict(headers))


def test_without_a_secret_each_tenant_has_one_of_the_instances_key_and_none_is_that_key() -> None:
    secrets = Settings(api_key=SecretStr("key of the instance")).webhook_secrets()
    found = [secrets.of(tenant) for tenant in ("default", "bob", "bob2")]
    assert len({*found, b"key of the instance"}) == 4
    assert all(len(secret) == 32 for secret in found)
    assert secrets.of("bob") == Settings(api_key=SecretStr("key of the instance")).webhook_secrets().of("bob")
    assert secrets.of("bob") != Settings(api_key=SecretStr("another key")).webhook_secrets().of("bob")
    assert "key of" not in repr(secrets)


def test_the_secret_that_is_set_is_the_default_tenants_and_nobody_elses_comes_from_it() -> None:
    key, text = SecretStr("key of the instance"), "whsec_" + base64.b64encode(SECRET).decode()
    derived = Settings(api_key=key).webhook_secrets()
    secrets = Settings(api_key=key, webhooks=WebhookSettings(secret=SecretStr(text))).webhook_secrets()
    assert secrets.of("default") == SECRET
    assert secrets.shown_to("default") == text
    assert secrets.of("bob") == derived.of("bob")


@pytest.mark.parametrize("wrong", ["plain", "whsec_", "whsec_***"])
def test_what_is_no_secret_in_its_notation_is_refused(wrong: str) -> None:
    with pytest.raises(ValidationError):
        WebhookSettings(secret=SecretStr(wrong))


def test_there_is_no_secret_without_a_key_to_derive_it_from() -> None:
    with pytest.raises(SettingsIncomplete):
        Settings().webhook_secrets()
