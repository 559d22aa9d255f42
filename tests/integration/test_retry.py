"""Jobs without a record, done once more by a running instance."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.integration.instance import Running

PATIENCE_S = 60

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def http(running: Running) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {running.api_key}"}
    with httpx.Client(base_url=f"{running.url}/v2/ep/", headers=headers, timeout=PATIENCE_S) as http:
        yield http


def answered(http: httpx.Client, path: str, **options: Any) -> dict[str, Any]:
    reply = http.post(path, **options)
    assert reply.status_code == 200, reply.text
    body: dict[str, Any] = reply.json()
    return body


@pytest.mark.parametrize("call", ["run", "runsync"])
def test_what_failed_is_tried_again_under_its_id_and_told_with_its_retries(http: httpx.Client, call: str) -> None:
    asked = {"input": {"type": "download_by_key", "key": "datasets/none/1.png"}, "s3Config": {"bucketName": "mine"}}
    job_id = answered(http, call, json=asked)["id"]
    first = answered(http, f"status-sync/{job_id}?wait=20000")
    assert (first["status"], "retries" in first) == ("FAILED", False)
    for retries in (1, 2):
        assert answered(http, f"retry/{job_id}") == {"id": job_id, "status": "IN_QUEUE"}
        again = answered(http, f"status-sync/{job_id}?wait=20000")
        assert (again["status"], again["retries"]) == ("FAILED", retries)
        assert again["output"]["error_type"] == first["output"]["error_type"]


def test_what_was_done_is_not_done_again(http: httpx.Client) -> None:
    job_id = answered(http, "runsync", json={"input": {"type": "list_models"}})["id"]
    refused = http.post(f"retry/{job_id}")
    assert (refused.status_code, refused.json()["error_type"]) == (409, "job_not_retryable")
    assert http.post("retry/sync-unknown-u1").status_code == 404
