"""Copies of polled records: true, few, and gone when nobody asks."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from serve_app.ingress import watched
from serve_app.ingress.watched import WatchedRecords
from serve_app.testing import TENANT, LocalServer
from storage.errors import JobNotFound, JobsUnavailable
from storage.job_state import JobKind, JobState
from storage.jobs_testing import JobsWorld

OWNER = "dispatcher-1"


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not holds():  # noqa: ASYNC110 the change comes from another thread
            await asyncio.sleep(0)


async def test_a_copy_follows_its_record_until_it_has_ended(server: LocalServer, world: JobsWorld) -> None:
    records = WatchedRecords(server.jobs)
    key = (TENANT, "x")
    record = world.create(tenant=TENANT)
    records.watch(key, record)

    def state() -> JobState | None:
        copy = records.get(key)
        return None if copy is None else copy.state

    world.jobs.claim(JobKind.GENERATION, OWNER)
    await until(lambda: state() is JobState.STARTING)
    world.jobs.start(record.id, OWNER)
    await until(lambda: state() is JobState.RUNNING)
    world.jobs.complete(record.id, OWNER, {})
    await until(lambda: state() is None)


async def test_an_ended_record_is_not_kept(server: LocalServer, world: JobsWorld) -> None:
    record = world.create(tenant=TENANT)
    records = WatchedRecords(server.jobs)
    records.watch((TENANT, "x"), world.jobs.request_cancel(record.id, tenant=TENANT))
    assert records.get((TENANT, "x")) is None


async def test_a_copy_that_cannot_be_kept_true_is_dropped(server: LocalServer, world: JobsWorld) -> None:
    async def fail(*_: Any, **__: Any) -> None:
        raise JobsUnavailable("wait")

    records = WatchedRecords(server.jobs)
    server.jobs.wait = fail  # type: ignore[method-assign, assignment]
    records.watch((TENANT, "x"), world.create(tenant=TENANT))
    await until(lambda: records.get((TENANT, "x")) is None)


async def test_nobody_asks_and_the_copy_goes(server: LocalServer, world: JobsWorld, monkeypatch: Any) -> None:
    now = 0.0
    monkeypatch.setattr(watched, "SLICE_S", 0.001)
    records = WatchedRecords(server.jobs, clock_s=lambda: now)
    records.watch((TENANT, "x"), world.create(tenant=TENANT))
    await asyncio.sleep(0)
    now = watched.IDLE_S + 1
    await until(lambda: not records._watches)


async def test_there_are_never_more_copies_than_places(
    server: LocalServer, world: JobsWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watched, "WATCHED_MAX", 2)
    records = WatchedRecords(server.jobs)
    for name in "abc":
        records.watch((TENANT, name), world.create(tenant=TENANT))
    assert [records.get((TENANT, name)) is not None for name in "abc"] == [True, True, False]
    await records.close()
    assert records.get((TENANT, "a")) is None


async def test_a_second_poll_asks_no_other_process_and_a_cancel_is_seen_at_once(
    server: LocalServer, world: JobsWorld
) -> None:
    body = {"input": {"prompt": "a"}}
    async with server.client() as http:
        job = (await http.post("/v2/ep/run", json=body)).json()["id"]
        first = (await http.get(f"/v2/ep/status/{job}")).json()
        found = server.jobs.get_by_runpod_id

        async def unexpected(*_: Any, **__: Any) -> Any:
            raise JobNotFound("x")

        server.jobs.get_by_runpod_id = unexpected  # type: ignore[method-assign]
        assert (await http.get(f"/v2/ep/status/{job}")).json()["status"] == first["status"] == "IN_QUEUE"
        server.jobs.get_by_runpod_id = found  # type: ignore[method-assign]
        assert (await http.post(f"/v2/ep/cancel/{job}")).json()["status"] == "CANCELLED"
        assert (await http.get(f"/v2/ep/status/{job}")).json()["status"] == "CANCELLED"
