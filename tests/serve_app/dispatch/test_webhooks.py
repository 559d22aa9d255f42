"""Webhooks: the status object and the input, signed, to every final state, and never at the job's expense."""

import asyncio
import base64
import json
from collections.abc import Mapping
from typing import Any

import pytest
from pydantic import SecretStr, ValidationError
from standardwebhooks.webhooks import Webhook, WebhookVerificationError

from serve_app.dispatch.webhooks import WebhookSender
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


async def submit(server: LocalServer, **body: Any) -> str:
    async with server.client() as http:
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
    assert await sender(server, receiver).send_due() == 0
    async with server.client() as http:
        await http.post(f"/v2/ep/cancel/{job_id}")
    await completed(server)
    assert await sender(server, receiver).send_due() == 2
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
    await sender(server, receiver).send_due()
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
    await sender(server, receiver).send_due()
    told = {body["input"].get("type"): body for body in receiver.bodies}
    assert told["health"]["status"] == "COMPLETED"
    assert (told["nonsense"]["status"], told["nonsense"]["error"]) == ("FAILED", "Unknown job type: nonsense")
    assert told[None]["output"]["process_id"].startswith("gen_")
    await server.jobs.claim(JobKind.GENERATION, OWNER)
    assert await sender(server, receiver).send_due() == 0


async def test_a_receiver_that_fails_is_tried_again_under_the_same_id(server: LocalServer, world: JobsWorld) -> None:
    receiver = Receiver(OutboundFailed("status 500"), OutboundFailed("timeout"))
    await completed(server)
    for wait_s in (10, 20, 40):
        assert await sender(server, receiver).send_due() == 1
        assert await sender(server, receiver).send_due() == 0
        world.clock.advance(wait_s)
    assert len(receiver.received) == 1
    assert await sender(server, receiver).send_due() == 0


async def test_what_nobody_expected_of_one_webhook_is_a_failed_attempt_of_that_one_only(
    server: LocalServer, world: JobsWorld, caplog: pytest.LogCaptureFixture
) -> None:
    counters = Tally()
    receiver = Receiver(*[UnicodeError("a label of secret.example.com is empty")] * 4)
    await completed(server)
    for wait_s in (10, 20, 40):
        assert await sender(server, receiver, counters=counters).send_due() == 1
        world.clock.advance(wait_s)
    assert await sender(server, receiver).send_due() == 0
    assert counters.counts() == {WEBHOOK_FAILURES: {"UnicodeError": 3}}
    assert "was given up" in caplog.text
    assert "secret.example.com" not in caplog.text


async def test_the_sender_outlives_an_outcome_that_cannot_be_noted(server: LocalServer) -> None:
    async def broken(*_: Any, **__: Any) -> bool:
        raise RuntimeError

    server.jobs.settle_webhook = broken  # type: ignore[method-assign]
    await completed(server)
    assert await sender(server, Receiver()).send_due() == 1


async def test_a_receiver_that_never_answers_changes_nothing_for_the_job(
    server: LocalServer, world: JobsWorld, caplog: pytest.LogCaptureFixture
) -> None:
    receiver = Receiver(*[OutboundFailed("timeout")] * 3)
    job_id = await completed(server)
    for _ in range(4):
        await sender(server, receiver).send_due()
        world.clock.advance(100)
    assert receiver.received == []
    assert "was given up" in caplog.text
    assert URL not in caplog.text
    async with server.client() as http:
        assert (await http.get(f"/v2/ep/status/{job_id}")).json()["status"] == "COMPLETED"


async def test_a_store_that_makes_no_urls_is_tried_again_later(server: LocalServer, world: JobsWorld) -> None:
    receiver = Receiver()
    await completed(server)
    server.store.fail("presign_get", StorageFailed("presign_get", 4, "connection"))
    await sender(server, receiver).send_due()
    assert receiver.received == []
    world.clock.advance(10)
    await sender(server, receiver).send_due()
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

    async def flaky(limit: int = 16) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise JobsUnavailable("take_webhooks")
        return await take(limit)

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
    await sender(server, receiver, server.services.webhook_secrets).send_due()
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
