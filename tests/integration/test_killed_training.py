"""A training whose worker, and then whose driver, is killed with -9 in its midst, beside the same one unbroken."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file

from serve_app.cli.client import ApiClient
from serve_app.cli.trainings import upload_folder
from tests.integration.conftest import PICTURES
from tests.integration.instance import Running, training_config

STEPS, SAVE_EVERY = 24, 4
PATIENCE_S = 240.0
POLL_S = 0.1

pytestmark = pytest.mark.timeout(900)


def processes_below(instance: Running) -> list[psutil.Process]:
    """All that this instance started; other instances of the machine are not among them."""
    own = instance.instance.processes()
    found = {process.pid: process for process in own}
    for process in own:
        try:
            found |= {child.pid: child for child in process.children(recursive=True)}
        except psutil.NoSuchProcess:
            continue
    return list(found.values())


def driver_of(instance: Running, process_id: str) -> psutil.Process | None:
    """The Python process that `ray job submit` started, not the shell around it."""
    return _first(instance, lambda words: "train_jobs.run" in words and process_id in words)


def worker_of(instance: Running, _: str) -> psutil.Process | None:
    return _first(instance, lambda words: any("TrainWorker" in word for word in words))


def _first(instance: Running, is_it: Callable[[list[str]], bool]) -> psutil.Process | None:
    for process in processes_below(instance):
        try:
            if is_it(process.cmdline()):
                return process
        except psutil.NoSuchProcess:
            continue
    return None


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(POLL_S)


def begin(client: ApiClient, name: str) -> str:
    config = training_config(name=name, steps=STEPS, save_every=SAVE_EVERY)
    process = config["config"]["process"][0]
    process["train"]["dtype"] = "fp32"
    process["save"]["dtype"] = "fp32"
    return str(client.call("train", config=config)["process_id"])


def adapter(client: ApiClient, process: dict[str, Any], path: Path) -> dict[str, Any]:
    assert process["status"] == "completed", process["error"]
    client.fetch(client.call("download", process_id=process["id"])["url"], path)
    return load_file(path)


def resumed_at(client: ApiClient, process_id: str) -> int:
    return int(client.process(process_id)["metrics"].get("resumed_from_step") or 0)


def test_a_training_whose_worker_and_then_driver_is_killed_ends_with_the_adapter_of_an_unbroken_one(
    running: Running, client: ApiClient, tmp_path: Path
) -> None:
    upload_folder(client, PICTURES, "zib", on_upload=lambda _: None)

    def follow(process_id: str) -> dict[str, Any]:
        return client.follow(process_id, lambda _: None)

    expected = adapter(client, follow(begin(client, "unbroken")), tmp_path / "unbroken.safetensors")
    process_id = begin(client, "killed")
    resumed = 0
    for victim_of in (worker_of, driver_of):
        # Past a checkpoint that this attempt made itself.
        wait_for(lambda step=resumed + SAVE_EVERY: (client.process(process_id)["step"] or 0) > step)  # type: ignore[misc]
        victim = victim_of(running, process_id)
        assert victim is not None
        assert victim.pid != os.getpid()
        victim.kill()
        wait_for(lambda before=resumed: resumed_at(client, process_id) > before)  # type: ignore[misc]
        resumed = resumed_at(client, process_id)

    process = follow(process_id)
    found = adapter(client, process, tmp_path / "killed.safetensors")
    assert process["metrics"]["resumed_from_step"] == resumed >= 2 * SAVE_EVERY
    assert process["step"] == STEPS
    assert found.keys() == expected.keys()
    assert max(float((found[key] - tensor).abs().max()) for key, tensor in expected.items()) < 1e-6
