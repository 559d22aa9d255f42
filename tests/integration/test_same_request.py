"""A hundred identical submissions at the same time are one job."""

from __future__ import annotations

import asyncio
import uuid
from typing import Any

import httpx
import pytest

from tests.integration.instance import Running

AT_ONCE = 100
# How those that came while the first was at work are told to come again.
IN_FLIGHT = (409, "idempotency_in_flight")
PATIENCE_S = 120

pytestmark = pytest.mark.timeout(300)


def _drawing() -> dict[str, Any]:
    return {"prompt": f"a star {uuid.uuid4().hex}", "width": 64, "height": 64, "num_inference_steps": 2}


async def submitted_at_once(running: Running, path: str, body: dict[str, Any]) -> list[httpx.Response]:
    """The replies, each of a connection of its own, whose requests have one new key."""
    headers = {"Authorization": f"Bearer {running.api_key}", "Idempotency-Key": str(uuid.uuid4())}
    limits = httpx.Limits(max_connections=AT_ONCE)
    async with httpx.AsyncClient(base_url=running.url, headers=headers, timeout=PATIENCE_S, limits=limits) as http:
        return await asyncio.gather(*(http.post(path, json=body) for _ in range(AT_ONCE)))


async def generations_of(running: Running, prompt: str) -> list[str]:
    headers = {"Authorization": f"Bearer {running.api_key}"}
    async with httpx.AsyncClient(base_url=running.url, headers=headers, timeout=PATIENCE_S) as http:
        listed = (await http.get("/v1/generations", params={"limit": 200})).json()["items"]
    return [str(item["id"]) for item in listed if prompt in str(item)]


async def test_of_runpods_surface_all_are_told_the_same_id(running: Running) -> None:
    drawing = _drawing()
    replies = await submitted_at_once(running, "/v2/ep/run", {"input": {"type": "generate", **drawing}})
    assert [reply.status_code for reply in replies] == [200] * AT_ONCE
    assert len({reply.json()["id"] for reply in replies}) == 1
    assert len(await generations_of(running, drawing["prompt"])) == 1


async def test_of_the_native_surface_none_makes_a_second_one(running: Running) -> None:
    drawing = _drawing()
    replies = await submitted_at_once(running, "/v1/generations", drawing)
    accepted = [reply for reply in replies if reply.status_code == 202]
    others = [(reply.status_code, reply.json()["code"]) for reply in replies if reply.status_code != 202]
    assert accepted
    assert set(others) <= {IN_FLIGHT}
    assert await generations_of(running, drawing["prompt"]) == [accepted[0].json()["id"]]
    assert len({reply.json()["id"] for reply in accepted}) == 1
