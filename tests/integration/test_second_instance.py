"""A second instance beside the shared one, killed with -9 in the middle of a training and started again.

One kill in the suite. `RAYLORA_TEST_KILLS=4 pytest tests/integration/test_second_instance.py` kills at random moments.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve_app.cli.client import ApiClient, ApiError
from serve_app.cli.trainings import upload_folder
from serve_app.stack.instance import Instance
from tests.integration.instance import REPOSITORY, Home, Running, temporary_home, training_config

PICTURES = REPOSITORY / "examples" / "zib" / "images"
STEPS, SAVE_EVERY = 24, 4
KILLS = int(os.environ.get("RAYLORA_TEST_KILLS", "1"))
FINAL = {"completed", "failed"}

pytestmark = pytest.mark.timeout(300 * (KILLS + 1))


@pytest.fixture(scope="module")
def home() -> Iterator[Home]:
    with temporary_home() as home:
        yield home


@pytest.fixture(scope="module")
def second(home: Home) -> Running:
    return home.start()


def wait_for(condition: Callable[[], bool], *, timeout_s: float = 240.0) -> None:
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.2)


def kill(instance: Instance, *, everything: bool) -> None:
    """SIGKILL to the supervisor, whose watchdog must end the rest; or to the watchdog and all others as well."""
    supervisor = instance.supervisor()
    assert supervisor is not None
    others = instance.processes() if everything else []
    supervisor.kill()
    for process in others:
        process.kill()
    wait_for(lambda: instance.processes() == [], timeout_s=60)


def reached(client: ApiClient, process_id: str, step: int) -> bool:
    process = client.process(process_id)
    return process["status"] in FINAL or (process["step"] or 0) >= step


def follow(client: ApiClient, process_id: str) -> dict[str, Any]:
    return client.follow(process_id, lambda _: None)


def test_two_instances_run_side_by_side(running: Running, second: Running) -> None:
    with second.client() as neighbour:
        assert neighbour.call("health")["status"]
        assert list(neighbour.processes(10)) == []
    with httpx.Client(base_url=second.url, headers={"Authorization": f"Bearer {running.api_key}"}) as stranger:
        assert stranger.get("/readyz").status_code == 401
    for instance in (second, running):
        state = instance.instance.read_state()
        assert state is not None
        done = instance.ray_job("printenv", "RAY_ADDRESS")
        assert done.returncode == 0
        assert str(state.ray_address) in done.stdout


def listed_once(instance: Running) -> tuple[str, dict[str, Any]]:
    """A job without a record, sent under a key of its client's: its id and its status."""
    headers = {"Authorization": f"Bearer {instance.api_key}", "Idempotency-Key": "listing-1"}
    with httpx.Client(base_url=f"{instance.url}/v2/ep", headers=headers, timeout=60) as http:
        job_id = http.post("/run", json={"input": {"type": "list_dataset_folders"}}).json()["id"]
        return job_id, http.get(f"/status-sync/{job_id}").json()


def test_a_training_survives_its_instance_and_nothing_else_does(running: Running, home: Home, second: Running) -> None:
    rng = random.Random()
    moments = [2 * SAVE_EVERY] if KILLS == 1 else sorted(rng.randrange(STEPS) for _ in range(KILLS))
    killed = second
    with killed.client() as client:
        upload_folder(client, PICTURES, "zib", on_upload=lambda _: None)
        accepted = client.call("generate", prompt="a red star", num_inference_steps=2, wait=False)
        finished = accepted["process_id"]
        assert follow(client, finished)["status"] == "completed"
        config = training_config(name="killed", steps=STEPS, save_every=SAVE_EVERY)
        process_id = client.call("train", config=config)["process_id"]
        queued = client.call("train", config=training_config(name="after", steps=1))["process_id"]
    listed = listed_once(second)
    assert listed[1]["output"]["folders"] == ["zib"]
    for number, moment in enumerate(moments):
        with killed.client() as client:
            wait_for(lambda step=moment: reached(client, process_id, step))  # type: ignore[misc]
        kill(killed.instance, everything=number % 2 == 1)
        killed = home.start()
    assert listed_once(killed) == listed
    with killed.client() as client:
        client.call("cancel", process_id=queued)
        process = follow(client, process_id)
        # After several kills the first training may have ended before, and this one have begun: it is asked to stop.
        behind = follow(client, queued)
        assert behind["status"] == "cancelled" or KILLS > 1
        if KILLS == 1:
            assert process["status"] == "completed", process["error"]
            assert process["metrics"]["resumed_from_step"] >= SAVE_EVERY
        else:
            assert process["status"] == "completed" or process["error"]
        states = {entry["id"]: entry["status"] for entry in client.processes(10)}
        assert states == {finished: "completed", process_id: process["status"], queued: behind["status"]}
        if process["status"] == "completed":
            url = client.call("download", process_id=process_id)["url"]
            assert client.fetch(url, home.instance.home / "lora.safetensors") > 0
    home.stop()
    assert home.instance.processes() == []
    with running.client() as client:
        assert client.call("health")["status"]


def test_a_client_of_a_killed_instance_is_told_that_nothing_answers(home: Home, tmp_path: Path) -> None:
    with ApiClient(f"http://127.0.0.1:{home.environment['RAYLORA_PORT']}", "any") as client, pytest.raises(ApiError):
        client.call("health")
