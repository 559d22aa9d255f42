import asyncio
from datetime import UTC, datetime
from typing import Any, cast

import pytest

from serve_app.dispatch.replies import ReplyTable
from serve_app.dispatch.reply import EndedReply, Fingerprint, Opening, Reopened, Reply, Sent, Settled, Status
from serve_app.errors import (
    IdempotencyKeyReused,
    RunpodJobNotFound,
    RunpodJobNotKept,
    RunpodJobNotRetryable,
)
from serve_app.policy import Policy
from storage.jobs_testing import ManualClock

BY_KEY = Fingerprint("key:k", "sha-1", 3600.0, named_by_client=True)
BY_BODY = Fingerprint("body:sha-1", "sha-1", 10.0, named_by_client=False)


def table(**bounds: int) -> tuple[ReplyTable, ManualClock]:
    clock = ManualClock()
    return ReplyTable(clock, **bounds), clock


def opened(replies: ReplyTable, name: str, fingerprint: Fingerprint | None = None, tenant: str = "matt") -> str:
    return replies.open(tenant, name, Opening(60.0, fingerprint))


def settle(replies: ReplyTable, name: str, output: dict[str, Any], error: str | None = None) -> None:
    reply = Reply("COMPLETED" if error is None else "FAILED", datetime.now(UTC), output=output, error=error)
    replies.settle(EndedReply("matt", name, reply, 60.0))


def test_a_reply_is_queued_then_final_then_gone() -> None:
    replies, clock = table()
    opened(replies, "a")
    reply = replies.get("matt", "a")
    assert reply is not None
    assert reply.status == "IN_QUEUE"
    settle(replies, "a", output={"x": 1})
    clock.advance(59)
    reply = replies.get("matt", "a")
    assert reply is not None
    assert (reply.status, reply.output) == ("COMPLETED", {"x": 1})
    clock.advance(1)
    assert replies.get("matt", "a") is None


def test_what_never_ends_is_forgotten_too() -> None:
    replies, clock = table()
    opened(replies, "a")
    clock.advance(661)
    assert replies.get("matt", "a") is None


def owned(replies: ReplyTable, name: str, owner: str) -> None:
    replies.open("matt", name, Opening(60.0, owner=owner))


def test_a_job_whose_process_is_silent_has_failed_and_says_so_once() -> None:
    replies, clock = table()
    owned(replies, "lost", "silent")
    owned(replies, "held", "alive")
    clock.advance(29)
    replies.hear_from("alive")
    clock.advance(1)
    lost, held = replies.get("matt", "lost"), replies.get("matt", "held")
    assert lost is not None
    assert held is not None
    assert (lost.status, lost.is_interrupted, held.status) == ("FAILED", True, "IN_QUEUE")
    assert lost.output == {"error": lost.error, "error_type": "job_interrupted"}
    settle(replies, "lost", output={"done": True})
    assert replies.get("matt", "lost") == lost


def test_what_ended_before_its_process_was_lost_keeps_its_end() -> None:
    replies, clock = table()
    owned(replies, "a", "silent")
    settle(replies, "a", output={"x": 1})
    clock.advance(31)
    reply = replies.get("matt", "a")
    assert reply is not None
    assert (reply.status, reply.output) == ("COMPLETED", {"x": 1})


def test_a_second_ending_is_ignored() -> None:
    replies, _ = table()
    opened(replies, "a")
    settle(replies, "a", output={}, error="first")
    settle(replies, "a", output={})
    reply = replies.get("matt", "a")
    assert reply is not None
    assert (reply.status, reply.error) == ("FAILED", "first")


def test_settling_what_is_unknown_is_harmless() -> None:
    replies, _ = table()
    settle(replies, "a", output={})
    assert replies.get("matt", "a") is None


def test_another_tenant_sees_nothing() -> None:
    replies, _ = table()
    opened(replies, "a")
    assert replies.get("matt2", "a") is None


@pytest.mark.parametrize("fingerprint", [BY_KEY, BY_BODY])
def test_the_same_request_gets_the_first_id_for_a_while(fingerprint: Fingerprint) -> None:
    replies, clock = table()
    assert opened(replies, "a", fingerprint) == "a"
    assert opened(replies, "b", fingerprint) == "a"
    assert opened(replies, "c", fingerprint, tenant="matt2") == "c"
    clock.advance(fingerprint.kept_s)
    assert opened(replies, "d", fingerprint) == "d"


def test_a_clients_key_with_another_body_is_refused() -> None:
    replies, _ = table()
    opened(replies, "a", BY_KEY)
    with pytest.raises(IdempotencyKeyReused):
        opened(replies, "b", Fingerprint("key:k", "sha-2", 3600.0, named_by_client=True))


def test_a_failure_frees_the_body_but_not_the_clients_key() -> None:
    replies, _ = table()
    opened(replies, "a", BY_BODY)
    opened(replies, "b", BY_KEY)
    settle(replies, "a", output={}, error="no")
    settle(replies, "b", output={}, error="no")
    assert opened(replies, "c", BY_BODY) == "c"
    assert opened(replies, "d", BY_KEY) == "b"


def test_a_record_takes_over_with_its_own_id() -> None:
    replies, _ = table()
    opened(replies, "a", BY_KEY)
    replies.hand_over("matt", "a", to="older")
    assert replies.get("matt", "a") is None
    assert opened(replies, "b", BY_KEY) == "older"


def test_a_key_goes_with_its_reply_and_not_before() -> None:
    replies, clock = table()
    opened(replies, "a", BY_KEY)
    settle(replies, "a", output={})
    clock.advance(59)
    assert opened(replies, "b", BY_KEY) == "a"
    clock.advance(1)
    assert opened(replies, "c", BY_KEY) == "c"
    assert opened(replies, "d", BY_KEY) == "c"


def test_a_key_goes_with_a_reply_that_the_bounds_drop() -> None:
    replies, _ = table(entries_max=1)
    opened(replies, "a", BY_KEY)
    settle(replies, "a", output={})
    opened(replies, "other")
    assert opened(replies, "b", BY_KEY) == "b"


def test_a_key_that_a_record_answers_for_stays_when_the_reply_goes() -> None:
    replies, clock = table()
    opened(replies, "a", BY_KEY)
    replies.cancel("matt", "a")
    replies.hand_over("matt", "a", to="a")
    clock.advance(3599)
    assert opened(replies, "b", BY_KEY) == "a"


def test_an_old_reply_that_goes_takes_no_newer_ones_key_with_it() -> None:
    replies, clock = table()
    replies.open("matt", "a", Opening(7200.0, BY_KEY))
    settle(replies, "a", output={})
    clock.advance(3601)
    replies.open("matt", "b", Opening(7200.0, BY_KEY))
    settle(replies, "b", output={})
    clock.advance(3599.5)
    assert replies.get("matt", "a") is None
    assert replies.open("matt", "c", Opening(7200.0, BY_KEY)) == "b"


def test_the_table_is_bounded_by_number_and_by_bytes() -> None:
    replies, _ = table(entries_max=2)
    for name in "abc":
        opened(replies, name)
    assert [replies.get("matt", name) is not None for name in "abc"] == [False, True, True]
    replies, _ = table(bytes_max=50)
    for name in "ab":
        opened(replies, name)
        settle(replies, name, output={"x": "y" * 30})
    assert [replies.get("matt", name) is not None for name in "ab"] == [False, True]


async def test_a_waiter_hears_of_the_end_at_once() -> None:
    replies, _ = table()
    opened(replies, "a")
    waiter = asyncio.create_task(replies.wait("matt", "a", 60.0))
    await asyncio.sleep(0)
    settle(replies, "a", output={"x": 1})
    reply = await waiter
    assert reply is not None
    assert reply.status == "COMPLETED"


async def test_a_waiter_is_let_go_when_a_record_takes_over() -> None:
    replies, _ = table()
    opened(replies, "a")
    waiter = asyncio.create_task(replies.wait("matt", "a", 60.0))
    await asyncio.sleep(0)
    replies.hand_over("matt", "a", to="a")
    assert await waiter is None


async def test_a_wait_that_is_over_tells_how_things_stand() -> None:
    replies, _ = table()
    opened(replies, "a")
    reply = await replies.wait("matt", "a", 0.0)
    assert reply is not None
    assert reply.status == "IN_QUEUE"


def sent(name: str, *, size_bytes: int = 10) -> Sent:
    return Sent({"type": name}, Policy(), None, None, f"sha of {name}", size_bytes, "IN_PROGRESS")


def ended(name: str, status: Status, attempt: int = 1, kept: Sent | None = None) -> EndedReply:
    return EndedReply("matt", name, Reply(status, datetime.now(UTC), attempt=attempt), 60.0, kept)


def failed(replies: ReplyTable, name: str, kept: Sent | None, status: Status = "FAILED") -> None:
    replies.open("matt", name, Opening(60.0, owner="first", sent=kept))
    replies.settle(ended(name, status))


def reopen(replies: ReplyTable, name: str) -> Reopened:
    return replies.reopen("matt", name, owner="second", kept_s=600.0)


@pytest.mark.parametrize("status", ["FAILED", "TIMED_OUT"])
def test_what_came_to_nothing_begins_once_more_with_what_was_sent(status: Status) -> None:
    replies, clock = table()
    failed(replies, "a", sent("a"), status)
    clock.advance(50)
    assert reopen(replies, "a") == Reopened(sent("a"), attempt=2)
    assert replies.get("matt", "a") == Reply("IN_PROGRESS", clock(), attempt=2)
    assert replies.counts("matt") == {"IN_PROGRESS": 1, "retried": 1}
    assert replies.settle(ended("a", status, attempt=2)) == Settled(status, 2)
    assert reopen(replies, "a").attempt == 3
    clock.advance(20)
    assert replies.settle(ended("a", "COMPLETED", attempt=3)) == Settled("COMPLETED", 3)
    clock.advance(599)
    assert replies.get("matt", "a") is not None


def test_a_given_up_attempt_does_not_end_the_next_one() -> None:
    replies, clock = table()
    replies.open("matt", "a", Opening(60.0, owner="silent", sent=sent("a")))
    clock.advance(31)
    assert replies.get("matt", "a") is not None
    reopen(replies, "a")
    assert replies.settle(ended("a", "COMPLETED")) == Settled("IN_PROGRESS", 2)
    replies.keep(ended("a", "FAILED"))
    replies.hear_from("second")
    assert replies.settle(ended("a", "COMPLETED", attempt=2)) == Settled("COMPLETED", 2)


def test_only_what_failed_is_retried_and_only_what_is_known() -> None:
    replies, _ = table()
    for status in ("COMPLETED", "CANCELLED"):
        failed(replies, status, sent("a"), cast("Status", status))
        with pytest.raises(RunpodJobNotRetryable):
            reopen(replies, status)
    replies.open("matt", "under way", Opening(60.0, sent=sent("a")))
    with pytest.raises(RunpodJobNotRetryable):
        reopen(replies, "under way")
    failed(replies, "another's", sent("a"))
    with pytest.raises(RunpodJobNotFound):
        replies.reopen("matt2", "another's", owner="second", kept_s=60.0)


def test_what_was_sent_is_kept_within_bounds_and_a_reply_without_it() -> None:
    replies, _ = table(bytes_max=100)
    failed(replies, "a", sent("a", size_bytes=60))
    failed(replies, "b", sent("b", size_bytes=60))
    with pytest.raises(RunpodJobNotKept):
        reopen(replies, "a")
    assert replies.get("matt", "a") is not None
    assert reopen(replies, "b").sent == sent("b", size_bytes=60)


def test_a_failure_that_was_told_late_can_be_retried_too() -> None:
    replies, _ = table()
    replies.keep(ended("a", "FAILED", kept=sent("a")))
    assert reopen(replies, "a") == Reopened(sent("a"), attempt=2)
