"""Events of a job, and webhooks about its end: kept with the records, given out once."""

import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.errors import JobNotFound
from storage.job_record import NewWebhook
from storage.job_state import JobKind
from storage.job_streams import DRAIN_MAX, progress_events
from storage.jobs_testing import JobsWorld
from storage.records import RecordsTx
from storage.records_streams import EVENTS_MAX
from storage.webhook_record import WEBHOOK_ATTEMPTS_MAX, WEBHOOK_LEASE_S, retry_delay_s

OWNER = "w"
URL = "https://example.com/hook"


def told(world: JobsWorld, job_id: str) -> list[object]:
    return [event.data["step"] for event in world.jobs.drain(job_id, tenant="default").events]


def test_a_progress_that_changed_is_an_event_and_a_repeated_one_is_not(world: JobsWorld):
    job = world.running(OWNER)
    for step in (1, 1, 2):
        world.jobs.heartbeat(job.id, OWNER, progress={"step": step})
    world.jobs.heartbeat(job.id, OWNER)
    assert told(world, job.id) == [1, 2]
    assert told(world, job.id) == []


def test_an_owner_may_report_more_often_than_it_sends_heartbeats(world: JobsWorld):
    job = world.running(OWNER)
    world.jobs.heartbeat(job.id, OWNER, progress={"step": 2}, events=[{"step": 1}, {"step": 2}])
    world.jobs.heartbeat(job.id, OWNER, progress={"step": 2}, events=[])
    world.jobs.complete(job.id, OWNER, {}, events=[{"step": 3}])
    world.jobs.complete(job.id, OWNER, {}, events=[{"step": 3}])
    assert told(world, job.id) == [1, 2, 3]


def test_the_end_is_told_once_and_only_when_nothing_is_left(world: JobsWorld):
    job = world.running(OWNER)
    world.jobs.complete(job.id, OWNER, {}, events=[{"step": step} for step in range(DRAIN_MAX + 1)])
    drains = [world.jobs.drain(job.id, tenant="default") for _ in range(3)]
    assert [(len(it.events), it.is_end, it.was_ended) for it in drains] == [
        (DRAIN_MAX, False, False),
        (1, True, False),
        (0, True, True),
    ]


def test_events_can_be_read_again_from_any_place_without_draining_them(world: JobsWorld):
    job = world.running(OWNER)
    world.jobs.heartbeat(job.id, OWNER, events=[{"step": 1}, {"step": 2}])
    first, second = world.jobs.events(job.id, tenant="default")
    assert world.jobs.events(job.id, tenant="default", after=first.seq) == [second]
    assert told(world, job.id) == [1, 2]


def test_the_events_of_a_foreign_job_do_not_exist(world: JobsWorld):
    job = world.running(OWNER)
    with pytest.raises(JobNotFound):
        world.jobs.drain(job.id, tenant="other")
    with pytest.raises(JobNotFound):
        world.jobs.events(job.id, tenant="other")


def test_the_newest_events_are_kept_and_old_ones_forgotten(world: JobsWorld):
    job = world.running(OWNER)
    for start in range(0, 2 * EVENTS_MAX, 50):
        world.jobs.heartbeat(job.id, OWNER, events=[{"step": start + step} for step in range(50)])
    kept = world.jobs.events(job.id, tenant="default", limit=3 * EVENTS_MAX)
    assert kept[-1].data == {"step": 2 * EVENTS_MAX - 1}
    assert EVENTS_MAX <= len(kept) < EVENTS_MAX + 100
    world.clock.advance(world.policy.events_kept_s)
    world.jobs.reap()
    assert world.jobs.events(job.id, tenant="default") == []


@given(st.lists(st.integers(0, 5), max_size=6), st.lists(st.integers(0, 5), max_size=6))
@settings(max_examples=50)
def test_of_the_previews_only_the_added_ones_are_told(before: list[int], after: list[int]):
    old, new = ({"step": 1, "previews": [{"key": key} for key in keys]} for keys in (before, after))
    for event in progress_events(old, new):
        assert event["step"] == 1
        assert {item["key"] for item in event.get("previews", [])} == set(after) - set(before)


# --- webhooks


def asked(world: JobsWorld, **fields: object) -> str:
    return world.create(webhook=NewWebhook(url=URL, input={"prompt": "a cat"}), **fields).id


def test_a_webhook_is_due_at_the_end_of_its_job_and_not_before(world: JobsWorld):
    job_id = asked(world)
    world.jobs.claim(JobKind.GENERATION, OWNER)
    world.jobs.start(job_id, OWNER)
    assert world.jobs.take_webhooks() == []
    world.jobs.complete(job_id, OWNER, {})
    [webhook] = world.jobs.take_webhooks()
    assert (webhook.job_id, webhook.url, webhook.input, webhook.attempts) == (job_id, URL, {"prompt": "a cat"}, 1)
    assert world.jobs.take_webhooks() == []


def test_every_final_state_makes_it_due(world: JobsWorld):
    cancelled, failed, expired = asked(world), asked(world), asked(world, ttl_s=5.0)
    world.jobs.request_cancel(cancelled, tenant="default")
    world.jobs.claim(JobKind.GENERATION, OWNER)
    world.jobs.fail(failed, OWNER, "code", "text")
    world.clock.advance(5)
    world.jobs.reap()
    assert {webhook.job_id for webhook in world.jobs.take_webhooks()} == {cancelled, failed, expired}


def test_a_failed_attempt_is_repeated_after_growing_delays_and_then_given_up(world: JobsWorld):
    world.jobs.request_cancel(asked(world), tenant="default")
    ids = set()
    for attempt in range(1, WEBHOOK_ATTEMPTS_MAX + 1):
        [webhook] = world.jobs.take_webhooks()
        ids.add(webhook.message_id)
        assert webhook.attempts == attempt
        assert world.jobs.settle_webhook(webhook, delivered=False) == (attempt < WEBHOOK_ATTEMPTS_MAX)
        world.clock.advance(retry_delay_s(attempt) - 1)
        assert world.jobs.take_webhooks() == []
        world.clock.advance(1)
    assert world.jobs.take_webhooks() == []
    assert len(ids) == 1
    assert [retry_delay_s(attempt) for attempt in (1, 2, 3)] == [10, 20, 40]


def test_a_delivered_webhook_is_not_sent_again(world: JobsWorld):
    world.jobs.request_cancel(asked(world), tenant="default")
    [webhook] = world.jobs.take_webhooks()
    assert world.jobs.settle_webhook(webhook, delivered=True) is False
    world.clock.advance(24 * 3600)
    assert world.jobs.take_webhooks() == []


def test_webhooks_survive_a_restart_and_a_sender_that_died(world: JobsWorld):
    world.jobs.request_cancel(asked(world), tenant="default")
    for attempt in range(1, WEBHOOK_ATTEMPTS_MAX + 1):
        world.restart()
        [webhook] = world.jobs.take_webhooks()
        assert webhook.attempts == attempt
        world.clock.advance(WEBHOOK_LEASE_S)
    assert world.jobs.take_webhooks() == []


def test_an_attempt_that_ends_late_says_nothing_about_the_next_one(world: JobsWorld):
    world.jobs.request_cancel(asked(world), tenant="default")
    [first] = world.jobs.take_webhooks()
    world.clock.advance(WEBHOOK_LEASE_S)
    [second] = world.jobs.take_webhooks()
    assert world.jobs.settle_webhook(first, delivered=False) is False
    assert world.jobs.settle_webhook(second, delivered=False) is True


def test_the_end_of_a_retried_job_is_told_too_under_an_id_of_its_own(world: JobsWorld):
    job_id = asked(world)
    world.jobs.claim(JobKind.GENERATION, OWNER)
    world.jobs.fail(job_id, OWNER, "code", "text")
    [first] = world.jobs.take_webhooks()
    world.jobs.settle_webhook(first, delivered=True)
    world.jobs.retry(job_id, tenant="default")
    assert world.jobs.take_webhooks() == []
    world.jobs.request_cancel(job_id, tenant="default")
    [second] = world.jobs.take_webhooks()
    assert second.message_id != first.message_id
    assert second.attempts == 1


def test_a_repeated_creation_asks_for_one_webhook(world: JobsWorld):
    for _ in range(2):
        job_id = asked(world, idempotency_key="k", body_sha256="x")
    world.jobs.request_cancel(job_id, tenant="default")
    assert len(world.jobs.take_webhooks()) == 1


def test_a_job_without_a_record_is_told_at_once(world: JobsWorld):
    world.jobs.add_webhook(tenant="default", url=URL, input={"type": "health"}, body={"status": "COMPLETED"})
    [webhook] = world.jobs.take_webhooks()
    assert (webhook.job_id, webhook.body) == (None, {"status": "COMPLETED"})


def due(world: JobsWorld, tenant: str, count: int) -> None:
    for place in range(count):
        world.jobs.add_webhook(tenant=tenant, url=URL, input={}, body={"of": f"{tenant}{place}"})
        world.clock.advance(1)


def taken(world: JobsWorld, limit: int, **options: object) -> list[str]:
    return [webhook.body["of"] for webhook in world.jobs.take_webhooks(limit, **options)]


def test_tenants_take_turns_and_each_ones_webhooks_go_in_order(world: JobsWorld):
    due(world, "a", 5)
    due(world, "b", 2)
    due(world, "c", 1)
    assert taken(world, 5) == ["a0", "b0", "c0", "a1", "b1"]
    assert taken(world, 5) == ["a2", "a3", "a4"]


def test_a_tenant_has_no_more_under_way_than_it_may_and_who_has_least_comes_first(world: JobsWorld):
    due(world, "a", 5)
    due(world, "b", 5)
    due(world, "c", 5)
    assert taken(world, 16, limit_of_tenant=3, under_way={"a": 2, "b": 3, "gone": 9}) == ["c0", "c1", "a0", "c2"]
    assert taken(world, 16, limit_of_tenant=3, under_way={"a": 3, "b": 3, "c": 3}) == []
    assert taken(world, 1, limit_of_tenant=3, under_way={"a": 2}) == ["b0"]


def test_what_was_given_up_takes_no_place_for_long(world: JobsWorld):
    due(world, "a", 1)
    for _ in range(WEBHOOK_ATTEMPTS_MAX):
        assert taken(world, 1) == ["a0"]
        world.clock.advance(WEBHOOK_LEASE_S)
    due(world, "a", 1)
    assert [taken(world, 1), taken(world, 1)] == [[], ["a0"]]


def test_a_database_from_before_gets_the_indexes_that_it_lacks(world: JobsWorld):
    def names(tx: RecordsTx) -> set[str]:
        return {index["name"] for index in sa.inspect(tx._connection).get_indexes("webhooks")}

    with world.records.write("drop") as tx:
        tx._connection.exec_driver_sql("DROP INDEX webhooks_due")
        assert "webhooks_due" not in names(tx)
    world.restart()
    with world.records.read("look") as tx:
        assert "webhooks_due" in names(tx)
