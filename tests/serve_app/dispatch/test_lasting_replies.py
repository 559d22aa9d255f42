"""Jobs without a record after the process that had their replies was lost."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from serve_app.dispatch import lasting_replies
from serve_app.dispatch.lasting_replies import LastingReplies
from serve_app.dispatch.replies import ReplyTable
from serve_app.dispatch.reply import EndedReply, Fingerprint, Opening, Reply, Sent, Settled
from serve_app.errors import IdempotencyKeyReused, RunpodJobNotKept
from serve_app.links import Link
from serve_app.policy import Policy
from storage.async_jobs import AsyncJobs
from storage.errors import RecordsUnavailable
from storage.jobs_testing import JobsWorld
from tests.storage.postgres import database

KEYED = Fingerprint("key:k", "sha-1", 24 * 3600.0, named_by_client=True)


@pytest.fixture(params=["sqlite", "postgres"])
def world(tmp_path: Any, request: pytest.FixtureRequest) -> Iterator[JobsWorld]:
    with database(request.param) as url:
        world = JobsWorld(tmp_path, url=url)
        yield world
        world.close()


async def fresh(world: JobsWorld) -> LastingReplies:
    """As a new dispatcher begins."""
    replies = LastingReplies(ReplyTable(world.clock), AsyncJobs(world.jobs))
    await replies.restore()
    return replies


async def opened(replies: LastingReplies, name: str, *, fingerprint: Fingerprint | None = None, **named: Any) -> str:
    options = {"kept_s": 1800.0, "owner": "ingress-1", "status": "IN_PROGRESS", **named}
    return await replies.open("matt", name, Opening(fingerprint=fingerprint, **options))


async def settled(
    replies: LastingReplies, name: str, output: dict[str, Any], error: str | None = None
) -> Settled | None:
    reply = Reply("COMPLETED" if error is None else "FAILED", datetime.now(UTC), output=output, error=error)
    return await replies.settle(EndedReply("matt", name, reply, 1800.0))


async def test_what_ended_is_told_by_the_next_one_for_as_long(world: JobsWorld) -> None:
    first = await fresh(world)
    for name in ("done", "failed", "cancelled"):
        await opened(first, name)
    await settled(first, "done", {"x": [1, None, "\u00e4"]})
    await settled(first, "failed", {"error": "no"}, error="no")
    await first.cancel("matt", "cancelled")
    told = [first.table.get("matt", name) for name in ("done", "failed", "cancelled")]

    second = await fresh(world)
    assert [second.table.get("matt", name) for name in ("done", "failed", "cancelled")] == told
    assert second.table.get("matt2", "done") is None
    world.clock.advance(1801)
    assert (await fresh(world)).table.get("matt", "done") is None


async def test_a_url_is_not_kept_and_the_next_one_can_make_it_all_the_same(world: JobsWorld) -> None:
    link = Link("raylora/matt/processes/p/lora/a.safetensors", filename="a.safetensors")
    output = {"files": [{"url": link, "size": 3}], "url": link}
    first = await fresh(world)
    await opened(first, "done")
    await settled(first, "done", output)
    reply = (await fresh(world)).table.get("matt", "done")
    assert reply is not None
    assert reply.output == output


async def test_what_is_under_way_ends_in_the_next_one_or_is_lost_with_its_process(world: JobsWorld) -> None:
    first = await fresh(world)
    await opened(first, "goes on")
    await opened(first, "is lost", owner="ingress-2")
    second = await fresh(world)
    world.clock.advance(20)
    second.table.hear_from("ingress-1")
    world.clock.advance(20)
    second.table.hear_from("ingress-1")
    lost = second.table.get("matt", "is lost")
    assert lost is not None
    assert (lost.status, lost.is_interrupted) == ("FAILED", True)
    assert await settled(second, "goes on", {"x": 1}) == Settled("COMPLETED", 1)


async def test_a_clients_key_means_the_same_job_after_a_restart(world: JobsWorld) -> None:
    first = await fresh(world)
    assert await opened(first, "a", fingerprint=KEYED, kept_s=KEYED.kept_s) == "a"
    await settled(first, "a", {})
    world.clock.advance(23 * 3600)
    second = await fresh(world)
    assert second.table.get("matt", "a") == first.table.get("matt", "a")
    assert await opened(second, "b", fingerprint=KEYED) == "a"
    with pytest.raises(IdempotencyKeyReused):
        await opened(second, "c", fingerprint=Fingerprint("key:k", "sha-2", 3600.0, named_by_client=True))
    world.clock.advance(3601)
    assert await opened(await fresh(world), "d", fingerprint=KEYED) == "d"


async def test_a_key_whose_reply_was_not_kept_means_no_job_after_a_restart(world: JobsWorld) -> None:
    first = await fresh(world)
    await opened(first, "a", fingerprint=KEYED)
    await settled(first, "a", {})
    world.clock.advance(1801)
    assert await opened(await fresh(world), "b", fingerprint=KEYED) == "b"


async def test_a_job_that_a_record_takes_over_is_not_noted(world: JobsWorld) -> None:
    first = await fresh(world)
    await opened(first, "a", status="IN_QUEUE")
    assert world.jobs.noted_replies(lasting_replies.PREFIX) == []
    assert first.table.hand_over("matt", "a", to="a") is False


async def test_results_that_are_files_are_not_kept_twice(world: JobsWorld) -> None:
    first = await fresh(world)
    await opened(first, "a")
    await settled(first, "a", {"data": "x" * lasting_replies.NOTE_BYTES_MAX})
    assert first.table.get("matt", "a") is not None
    assert (await fresh(world)).table.get("matt", "a") is None


def sent(text: str) -> Sent:
    return Sent(
        {"type": "upload", "data": text},
        Policy(ttl_s=60.5),
        "https://example.com",
        "k",
        "sha-1",
        len(text),
        "IN_PROGRESS",
    )


@pytest.mark.parametrize("status", ["IN_PROGRESS", "IN_QUEUE"])
async def test_what_failed_is_retried_after_a_restart_and_its_retry_is_noted(world: JobsWorld, status: str) -> None:
    first = await fresh(world)
    await opened(first, "a", status=status, sent=sent("\u00e4"))
    await settled(first, "a", {}, error="no")
    second = await fresh(world)
    again = await second.reopen("matt", "a", owner="ingress-2", kept_s=1800.0)
    assert (again.sent, again.attempt) == (sent("\u00e4"), 2)
    reply = (await fresh(world)).table.get("matt", "a")
    assert reply is not None
    assert (reply.status, reply.attempt) == ("IN_PROGRESS", 2)


async def test_a_record_that_came_of_a_retry_answers_after_a_restart_too(world: JobsWorld) -> None:
    first = await fresh(world)
    await opened(first, "a", status="IN_QUEUE", sent=replace(sent("x"), begins_as="IN_QUEUE"))
    await settled(first, "a", {}, error="no")
    await first.reopen("matt", "a", owner="ingress-2", kept_s=1800.0)
    assert await first.hand_over("matt", "a", to="a") is False
    assert (await fresh(world)).table.get("matt", "a") is None


@pytest.mark.parametrize("extra", [-100, 1])
async def test_a_failure_is_noted_without_what_was_sent_where_that_is_large(world: JobsWorld, extra: int) -> None:
    first = await fresh(world)
    await opened(first, "a", sent=sent("x" * (lasting_replies.NOTE_BYTES_MAX + extra)))
    await settled(first, "a", {}, error="no")
    second = await fresh(world)
    assert second.table.get("matt", "a") is not None
    with pytest.raises(RunpodJobNotKept):
        await second.reopen("matt", "a", owner="ingress-2", kept_s=1800.0)


async def test_where_the_records_do_not_answer_the_table_goes_on_alone(
    world: JobsWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lasting_replies, "RESTORE_WAIT_S", 0.05)
    monkeypatch.setattr(lasting_replies, "RESTORE_RETRY_S", 0.01)
    earlier = await fresh(world)
    await opened(earlier, "before")
    await settled(earlier, "before", {"x": 1})
    jobs = AsyncJobs(world.jobs)
    call, is_away = jobs.call, True

    async def asked(*args: Any, **kwargs: Any) -> Any:
        if is_away:
            raise RecordsUnavailable("test")
        return await call(*args, **kwargs)

    monkeypatch.setattr(jobs, "call", asked)
    replies = LastingReplies(ReplyTable(world.clock), jobs)
    restoring = asyncio.create_task(replies.restore())
    assert await opened(replies, "a") == "a"
    assert await settled(replies, "a", {"x": 2}) == Settled("COMPLETED", 1)
    is_away = False
    await restoring
    found = [replies.table.get("matt", name) for name in ("before", "a")]
    assert [reply and reply.output for reply in found] == [{"x": 1}, {"x": 2}]


async def test_what_another_version_noted_is_left_out(world: JobsWorld) -> None:
    first = await fresh(world)
    await opened(first, "a")
    [noted] = world.jobs.noted_replies(lasting_replies.PREFIX)
    world.jobs.note_replies([type(noted)("matt", f"{lasting_replies.PREFIX}b", '{"odd": 1}', noted.expires_at)])
    second = await fresh(world)
    assert second.table.get("matt", "b") is None
    assert second.table.get("matt", "a") == Reply("IN_PROGRESS", world.clock())
