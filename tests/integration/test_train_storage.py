"""A real Ray Train whose storage is the storage actor's."""

from __future__ import annotations

import asyncio
import secrets
import tempfile
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
from storage.keys import Keys

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


def test_a_worker_that_starts_again_finds_the_checkpoint_through_the_storage_actor(embedded_s3: EmbeddedS3) -> None:
    namespace = f"train-{secrets.token_hex(4)}"
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
    try:
        assert trainer.fit().return_value == "learned"
        keys = [info.key for info in asyncio.run(store.list(prefix))]
        assert [key for key in keys if key.endswith("/weights")]
        assert all(key.startswith(f"{prefix}run/") for key in keys)
    finally:
        for entry in ray.util.list_named_actors(all_namespaces=True):
            if entry["namespace"] == namespace:
                ray.kill(ray.get_actor(entry["name"], namespace=namespace))
