"""Every request that an instance's S3 server gets is one that the storage actor counted, so all pass the breaker.

A recording proxy is in front of the server from the instance's start on.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve_app.cli.client import ApiClient
from storage.breaker import Outcome
from storage.counters import ATTEMPTS, REQUESTS, Counts
from storage.fault_proxy import FaultProxy, Recorded
from storage.s3_client import USER_AGENT
from tests.integration.instance import Running

# Of each operation, the requests of which an attempt makes exactly one. Others may go along, to look at what was
# written. Nobody is asked to sign a URL.
ONE_AN_ATTEMPT: dict[str, frozenset[str]] = {
    "put": frozenset({"put_object"}),
    "get": frozenset({"get_object"}),
    "head": frozenset({"head_object"}),
    "delete": frozenset({"delete_object"}),
    "delete_many": frozenset({"delete_objects"}),
    "list": frozenset({"list_objects_v2"}),
    "copy": frozenset({"copy_object"}),
    "upload_file": frozenset(
        {"create_multipart_upload", "upload_part", "complete_multipart_upload", "abort_multipart_upload"}
    ),
    "download_file": frozenset({"get_object"}),
    "list_uploads": frozenset({"list_multipart_uploads"}),
    "abort_upload": frozenset({"abort_multipart_upload"}),
    "health": frozenset({"head_bucket"}),
    "ensure_bucket": frozenset({"head_bucket"}),
    "capabilities": frozenset({"list_multipart_uploads", "delete_object"}),
    "presign_get": frozenset(),
    "presign_put": frozenset(),
}
TRIES = 5

pytestmark = pytest.mark.timeout(600)


def raylora(running: Running, *arguments: str, **environment: str) -> dict[str, Any]:
    """What a command prints as JSON."""
    command = [sys.executable, "-c", "from serve_app.cli.main import main; main()", *arguments, "--json"]
    done = subprocess.run(
        command, env={**running.environment, **environment}, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    printed: dict[str, Any] = json.loads(done.stdout)
    return printed


def by_labels(counts: Counts, metric: str) -> dict[tuple[str, str], int]:
    return {(first, second): int(n) for (first, _, second), n in split(counts.get(metric, {})).items()}


def split(values: dict[str, float]) -> dict[tuple[str, str, str], float]:
    return {labels.partition(","): value for labels, value in values.items()}


def accounted(running: Running, proxy: FaultProxy) -> tuple[list[Recorded], Counts]:
    """What the proxy has recorded and the actor has counted. Not every moment has both: requests may be under way."""
    for _ in range(TRIES):
        counts: Counts = raylora(running, "breaker")["counts"]
        recorded = [request for request in proxy.recorded if not request.is_presigned]
        if len(recorded) == sum(counts[REQUESTS].values()):
            break
    return recorded, counts


def test_a_whole_job_asks_s3_for_nothing_that_the_storage_actor_has_not_counted(
    running: Running, client: ApiClient, s3_proxy: FaultProxy, trained: dict[str, Any], tmp_path: Path
) -> None:
    asked_by_us = sum(request.is_presigned for request in s3_proxy.recorded)
    drawing = {"prompt": "zib", "num_inference_steps": 2, "width": 64, "height": 64, "wait": True}
    picture = client.call("generate", **drawing, loras=[{"id": trained["id"]}])["images"][0]
    httpx.get(picture["url"]).raise_for_status()
    lora = client.call("download", process_id=trained["id"])
    client.fetch(lora["url"], tmp_path / "lora.safetensors")
    swept = raylora(running, "sweep", RAYLORA_SWEEP__KEPT_TTL_S="0.001")

    recorded, counts = accounted(running, s3_proxy)

    # The job did go this way, Ray Train's own files and the sweep of kept latents included.
    written = {request.key for request in recorded if request.method in {"PUT", "POST"}}
    for part in (
        "/datasets/zib/",
        f"/{trained['id']}/lora/",
        f"/{trained['id']}/ray-train/",
        "/images/",
        "/processes/",
    ):
        assert any(part in key for key in written), part
    assert swept["totals"]["kept"]["objects"] > 0
    assert swept["failures"] == []

    # Nobody else asks, but for clients with the URLs that they were given.
    assert [request for request in recorded if USER_AGENT not in request.user_agent] == []
    assert sum(request.is_presigned for request in s3_proxy.recorded) == asked_by_us + 2

    requests, attempts = by_labels(counts, REQUESTS), by_labels(counts, ATTEMPTS)
    by_method: Counter[str] = Counter()
    for (_, method), number in requests.items():
        by_method[method] += number
    # An attempt that failed may not have reached the server.
    failed = sum(number for (_, outcome), number in attempts.items() if outcome == Outcome.FAILURE)
    seen = Counter(request.s3_method for request in recorded)
    assert seen - by_method == Counter()
    assert (by_method - seen).total() <= failed

    assert {operation for operation, _ in requests} <= {operation for operation, _ in attempts}
    for operation in {operation for operation, _ in attempts}:
        made = Counter({outcome: number for (name, outcome), number in attempts.items() if name == operation})
        sent = sum(requests.get((operation, method), 0) for method in ONE_AN_ATTEMPT[operation])
        needed = made.total() if ONE_AN_ATTEMPT[operation] else 0
        assert needed - made[Outcome.FAILURE] - made[Outcome.NEUTRAL] <= sent <= needed, operation


def test_an_operator_stops_all_requests_of_an_instance_and_lets_them_go_again(
    running: Running, client: ApiClient, s3_proxy: FaultProxy, trained: dict[str, Any]
) -> None:
    def readiness() -> tuple[int, dict[str, Any]]:
        reply = httpx.get(f"{running.url}/readyz", headers={"Authorization": f"Bearer {running.api_key}"})
        return reply.status_code, reply.json()

    assert readiness()[0] == 200
    try:
        opened = raylora(running, "breaker", "open")
        before = len(s3_proxy.recorded)
        status, told = readiness()
        assert len(s3_proxy.recorded) == before
    finally:
        closed = raylora(running, "breaker", "auto")
    assert (opened["breaker"], opened["breaker_mode"], opened["ok"]) == ("open", "forced_open", False)
    assert status == 503
    assert told["checks"]["storage"]["breaker"] == "open"
    assert (closed["breaker"], closed["breaker_mode"], closed["ok"]) == ("closed", "automatic", True)
    assert readiness()[0] == 200
    assert client.call("download", process_id=trained["id"])["size"] > 0
