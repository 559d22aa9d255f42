"""Replies of /runsync that are told to the shared table after their clients have them."""

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import pytest

from serve_app.dispatch.replies import ReplyTable
from serve_app.dispatch.reply import EndedReply, Opening, Reply
from serve_app.errors import ServiceUnavailable
from serve_app.ingress import near_replies
from serve_app.ingress.near_replies import NearReplies
from serve_app.settings import RequestLimits
from serve_app.testing import LocalServer, local_server
from storage.jobs_testing import JobsWorld

NOW = datetime(2026, 1, 2, tzinfo=UTC)
NOTHING = {"input": {"type": "process_status", "process_id": "train_000000000000"}}


def ended(number: int, output: Any = None) -> EndedReply:
    return EndedReply("a", str(number), Reply("COMPLETED", NOW, NOW, output or {"n": number}), 60.0)


class Table:
    """Counts messages; refuses them while `is_away`; they wait for `gate`."""

    def __init__(self) -> None:
        self.messages: list[list[str]] = []
        self.is_away = False
        self.gate = asyncio.Event()
        self.gate.set()

    async def keep_replies(self, some: Sequence[EndedReply]) -> None:
        await self.gate.wait()
        if self.is_away:
            raise ServiceUnavailable("dispatch")
        self.messages.append([one.runpod_id for one in some])


def near(table: Table, *, is_only_one: bool = True) -> NearReplies:
    async def sleep(_: float) -> None:
        await asyncio.sleep(0)

    return NearReplies(table, is_only_one=is_only_one, sleep=sleep)  # type: ignore[arg-type]


async def test_many_replies_are_one_message_and_are_found_until_it_arrived() -> None:
    table = Table()
    table.gate.clear()
    replies = near(table)
    for number in range(5):
        await replies.keep(ended(number))
    assert replies.get("a", "3") == ended(3).reply
    assert replies.get("b", "3") is None
    table.gate.set()
    await replies.arrived("a", "4")
    assert replies.get("a", "3") is None
    assert table.messages[0] == ["0", "1", "2", "3", "4"]


async def test_beside_other_replicas_a_reply_is_given_only_when_they_can_find_it() -> None:
    table = Table()
    replies = near(table, is_only_one=False)
    await asyncio.gather(*(replies.keep(ended(number)) for number in range(3)))
    assert {number for message in table.messages for number in message} == {"0", "1", "2"}


async def test_a_table_that_is_away_gets_them_later() -> None:
    table = Table()
    table.is_away = True
    replies = near(table)
    await replies.keep(ended(1))
    await replies.arrived("a", "1")
    assert replies.get("a", "1") is not None
    table.is_away = False
    await replies.close()
    assert table.messages == [["1"]]


async def test_what_waits_is_bounded_in_number_and_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near_replies, "WAITING_MAX", 3)
    table = Table()
    table.is_away = True
    replies = near(table)
    for number in range(5):
        await replies.keep(ended(number))
    assert [replies.get("a", str(number)) is None for number in range(5)] == [True, True, False, False, False]
    monkeypatch.setattr(near_replies, "WAITING_BYTES_MAX", 100)
    await replies.keep(ended(5, {"text": "x" * 200}))
    assert replies.get("a", "4") is None
    assert replies.get("a", "5") is not None


async def test_a_message_holds_only_so_many_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near_replies, "MESSAGE_BYTES_MAX", 30)
    table = Table()
    replies = near(table)
    table.gate.clear()
    for number in range(3):
        await replies.keep(ended(number, {"text": "x" * 10}))
    table.gate.set()
    await replies.close()
    assert {number for message in table.messages for number in message} == {"0", "1", "2"}
    assert max(len(message) for message in table.messages) == 1


def test_a_job_that_ended_before_it_was_opened_stays_ended() -> None:
    table = ReplyTable(lambda: NOW)
    table.keep(ended(1))
    assert table.open("a", "1", Opening(60)) == "1"
    assert table.get("a", "1") == ended(1).reply
    table.open("a", "2", Opening(60))
    table.keep(ended(2))
    table.keep(ended(2, {"n": "again"}))
    assert table.get("a", "2") == ended(2).reply


@pytest.mark.parametrize("replicas", [1, 2])
async def test_a_reply_is_found_under_its_id_from_then_on(world: JobsWorld, replicas: int) -> None:
    server = local_server(world.jobs, world.clock, ingress_replicas=replicas)
    async with server.client() as http:
        reply = (await http.post("/v2/ep/runsync", json=NOTHING)).json()
        assert reply["status"] == "COMPLETED"
        status = (await http.get(f"/v2/ep/status/{reply['id']}")).json()
        assert (status["status"], status["output"]) == ("COMPLETED", reply["output"])
        streams = [(await http.get(f"/v2/ep/stream/{reply['id']}")).json() for _ in range(2)]
        assert [len(stream["stream"]) for stream in streams] == [1, 0]


async def test_with_other_replicas_the_shared_table_has_it_before_the_client_does(world: JobsWorld) -> None:
    server = local_server(world.jobs, world.clock, ingress_replicas=2)
    async with server.client() as http:
        reply = (await http.post("/v2/ep/runsync", json=NOTHING)).json()
    found = server.dispatch.replies.get("matt", reply["id"])
    assert found is not None
    assert found.output == reply["output"]


async def test_a_job_that_outlasts_its_request_is_told_before_its_id_is(world: JobsWorld) -> None:
    server = local_server(world.jobs, world.clock, RequestLimits(wait_min_s=0.01))
    held = asyncio.Event()
    get = server.jobs.get

    async def slow(*args: Any, **kwargs: Any) -> Any:
        await held.wait()
        return await get(*args, **kwargs)

    server.jobs.get = slow  # type: ignore[method-assign]
    async with server.client() as http:
        reply = (await http.post("/v2/ep/runsync?wait=10", json=NOTHING)).json()
        assert reply["status"] == "IN_PROGRESS"
        assert server.dispatch.replies.get("matt", reply["id"]) is not None
        held.set()
        status = await ended_status(http, reply["id"])
    assert status["status"] == "COMPLETED"


async def ended_status(http: Any, job_id: str) -> dict[str, Any]:
    for _ in range(100):
        status: dict[str, Any] = (await http.get(f"/v2/ep/status-sync/{job_id}?wait=1000")).json()
        if status["status"] == "COMPLETED":
            return status
    raise AssertionError("it did not end")


async def test_a_record_answers_for_a_job_whose_request_ended_first(world: JobsWorld) -> None:
    server: LocalServer = local_server(world.jobs, world.clock, RequestLimits(wait_min_s=0.01))
    held = asyncio.Event()
    create = server.jobs.create

    async def slow(*args: Any, **kwargs: Any) -> Any:
        await held.wait()
        return await create(*args, **kwargs)

    server.jobs.create = slow  # type: ignore[method-assign]
    async with server.client() as http:
        reply = (await http.post("/v2/ep/runsync?wait=10", json={"input": {"prompt": "a cat"}})).json()
        assert reply["status"] == "IN_QUEUE"
        held.set()
        for _ in range(200):
            if server.dispatch.replies.get("matt", reply["id"]) is None:
                break
            await asyncio.sleep(0.005)
        [record] = (await server.jobs.list("matt")).records
        assert record.runpod_id == reply["id"]
        await server.jobs.request_cancel(record.id, tenant="matt")
        assert (await http.get(f"/v2/ep/status/{reply['id']}")).json()["status"] == "CANCELLED"
