"""A real Ray Train whose storage is the storage actor's."""

from __future__ import annotations

import asyncio
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.train
from ray.train import Checkpoint, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from storage.actor import StorageClient
from storage.arrow_files import arrow_files
from storage.embedded import EmbeddedS3
from storage.fault_proxy import Fault, FaultProxy
from storage.keys import Keys
from storage.loop_thread import LoopThread
from storage.patience import PatientStore
from storage.settings import BreakerSettings
from train_jobs.board import RunBoard
from train_jobs.run import BoardHandle

# Ray warns of settings that it reads itself.
pytestmark = [
    pytest.mark.usefixtures("ray_cluster"),
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
]


def _fail_once(_: dict[str, Any]) -> str:
    """The first worker leaves a checkpoint and dies; the next one returns what it finds in it."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            return Path(folder, "weights").read_text()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "weights").write_text("learned")
        ray.train.report({"step": 1}, checkpoint=Checkpoint.from_directory(folder))
    raise RuntimeError("the worker dies")


def _return(_: dict[str, Any]) -> str:
    return "trained"


@pytest.fixture
def namespace() -> Iterator[str]:
    """Of storage actors of its own, which are ended."""
    name = f"train-{secrets.token_hex(4)}"
    yield name
    for entry in ray.util.list_named_actors(all_namespaces=True):
        if entry["namespace"] == name:
            ray.kill(ray.get_actor(entry["name"], namespace=name))


@pytest.fixture
def proxy(embedded_s3: EmbeddedS3) -> Iterator[FaultProxy]:
    proxy, thread = FaultProxy(str(embedded_s3.settings().endpoint_url)), LoopThread("s3-proxy")
    thread.run_blocking(proxy.start())
    yield proxy
    thread.run_blocking(proxy.stop())
    thread.stop()


def _until(is_so: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 120
    while not is_so():
        assert time.monotonic() < deadline_s, "it did not come about"
        time.sleep(0.2)


def test_a_start_that_waits_for_the_storage_in_ray_trains_controller_is_told_of(
    embedded_s3: EmbeddedS3, proxy: FaultProxy, namespace: str
) -> None:
    settings = embedded_s3.settings().model_copy(update={"endpoint_url": proxy.url, "attempts_max": 1})
    store = StorageClient(settings, BreakerSettings(recovery_s=1.0), namespace=namespace)
    prefix = Keys("raylora", "default").ray_train_prefix(f"train_{secrets.token_hex(6)}")
    asyncio.run(store.ensure_bucket())
    board = BoardHandle(ray.remote(RunBoard).options(num_cpus=0).remote())
    trainer = TorchTrainer(
        _return,
        train_loop_config={},
        scaling_config=ScalingConfig(num_workers=1, resources_per_worker={"CPU": 1}),
        run_config=RunConfig(
            name="run",
            storage_path=prefix.rstrip("/"),
            storage_filesystem=arrow_files(PatientStore(store, tell=board.waiting), prefix),
        ),
    )
    proxy.always(Fault.SLOW_DOWN)
    with ThreadPoolExecutor(1) as thread:
        fitted = thread.submit(trainer.fit)
        try:
            _until(lambda: fitted.done() or board.latest() == (0, {"stage": "waiting for storage"}))
            assert not fitted.done()
        finally:
            proxy.always(None)
        assert fitted.result().return_value == "trained"
    assert board.latest() == (0, {})


def test_a_worker_that_starts_again_finds_the_checkpoint_through_the_storage_actor(
    embedded_s3: EmbeddedS3, namespace: str
) -> None:
    store = StorageClient(embedded_s3.settings(), namespace=namespace)
    prefix = Keys("raylora", "default").ray_train_prefix(f"train_{secrets.token_hex(6)}")
    asyncio.run(store.ensure_bucket())
    trainer = TorchTrainer(
        _fail_once,
        train_loop_config={},
        scaling_config=ScalingConfig(num_workers=1, resources_per_worker={"CPU": 1}),
        run_config=RunConfig(
            name="run",
            storage_path=prefix.rstrip("/"),
            storage_filesystem=arrow_files(store, prefix),
            failure_config=FailureConfig(max_failures=1),
        ),
    )
    assert trainer.fit().return_value == "learned"
    keys = [info.key for info in asyncio.run(store.list(prefix))]
    assert [key for key in keys if key.endswith("/weights")]
    assert all(key.startswith(f"{prefix}run/") for key in keys)
