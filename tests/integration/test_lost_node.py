"""A node of a two-node cluster that is lost in the middle of a training: its raylet is killed with -9.

Takes minutes, so it is run on request: `RAYLORA_TEST_LOST_NODE=1 pytest tests/integration/test_lost_node.py`.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load

from serve_app.stack.ports import any_free
from storage.embedded import EmbeddedS3
from tests.integration.instance import REPOSITORY

PICTURES = REPOSITORY / "examples" / "zib" / "images"
STEPS, SAVE_EVERY, LOST_AT = 120, 10, 25
PATIENCE_S = 300.0

pytestmark = [
    pytest.mark.skipif("RAYLORA_TEST_LOST_NODE" not in os.environ, reason="takes minutes; RAYLORA_TEST_LOST_NODE=1"),
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
]


@dataclass
class Nodes:
    """The cluster, what a driver needs to join it, and the jobs actor's configuration."""

    cluster: Any
    environment: dict[str, str]
    folder: Path
    store: Any
    lines: list[str] = field(default_factory=list)

    def add(self) -> Any:
        return self.cluster.add_node(num_cpus=1)

    def train(self, name: str, *, on_line: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
        """Run a training to its end; `on_line` sees what its driver says. Returns the record."""
        spec = {
            "name": name, "model": "tiny", "datasets": [{"local_path": str(PICTURES), "resolutions_px": [64]}],
            "network": {"rank": 4}, "workers": {"min": 1, "max": 2},
            "train": {"steps": STEPS, "batch_size": 2, "learning_rate": 1e-3, "dtype": "fp32"},
            "save": {"every_steps": SAVE_EVERY, "keep": 2, "dtype": "fp32"},
        }  # fmt: skip
        (self.folder / f"{name}.json").write_text(json.dumps(spec))
        command = [sys.executable, "-m", "train_jobs.run", "--config", str(self.folder / f"{name}.json")]
        with (self.folder / f"{name}.log").open("w") as log:
            driver = subprocess.Popen(command, env=self.environment, stdout=subprocess.PIPE, stderr=log, text=True)
            watchdog = threading.Timer(PATIENCE_S, driver.kill)
            watchdog.start()
            said: list[str] = []
            for line in driver.stdout or ():
                said.append(line.strip())
                on_line(line)
            watchdog.cancel()
        assert driver.wait() == 0, "\n".join([*said[-5:], (self.folder / f"{name}.log").read_text()[-3000:]])
        from storage.blocking_jobs import BlockingJobs

        jobs = BlockingJobs()
        record = jobs.get(said[0].removeprefix("process "))
        jobs.close()
        return {"output": record.output, "progress": record.progress}

    def adapter(self, record: dict[str, Any]) -> dict[str, Any]:
        return load(asyncio.run(self.store.get(record["output"]["loras"][0]["key"])))


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    """A head without room for workers, and one node with room for one."""
    home = Path(tempfile.mkdtemp(prefix="rl", dir="/tmp"))
    with pytest.MonkeyPatch.context() as patch, EmbeddedS3(tmp_path / "s3", 0) as s3:
        patch.setenv("HOME", str(home))
        # Ray notes the newest cluster of a machine there; others on this one must not join it.
        (home / "ray").mkdir()
        patch.setenv("RAY_TMPDIR", str(home))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]))
        import ray
        from ray.cluster_utils import Cluster

        from storage.actor import StorageClient
        from storage.jobs_actor import ensure_jobs_actor
        from storage.jobs_config import JobsConfig
        from storage.settings import RecordsSettings

        head = {"num_cpus": 0, "include_dashboard": False, "temp_dir": str(home / "r"), "gcs_server_port": any_free()}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            cluster.add_node(num_cpus=1)
            ray.init(address=cluster.address, namespace="raylora", log_to_driver=False)
            store = StorageClient(s3.settings())
            asyncio.run(store.ensure_bucket())
            ensure_jobs_actor(
                JobsConfig(
                    records=RecordsSettings(url=f"sqlite:///{tmp_path / 'jobs.sqlite'}"), s3=s3.settings(),
                    models={"tiny": str(REPOSITORY / "assets" / "tiny" / "model")},
                ),
                None,
            )  # fmt: skip
            yield Nodes(cluster, {**os.environ, "RAY_ADDRESS": cluster.address}, tmp_path, store)
        finally:
            ray.shutdown()
            cluster.shutdown()
            shutil.rmtree(home, ignore_errors=True)


def raylet_of(node: Any) -> int:
    return int(node.all_processes["raylet"][0].process.pid)


def test_a_training_whose_node_is_lost_goes_on_with_fewer_workers_to_the_same_adapter(nodes: Nodes) -> None:
    unbroken = nodes.train("unbroken")
    second = nodes.add()
    killed: list[int] = []

    def kill_in_time(line: str) -> None:
        found = re.match(r"step (\d+)/", line)
        if found and int(found[1]) >= LOST_AT and not killed:
            killed.append(int(found[1]))
            os.kill(raylet_of(second), signal.SIGKILL)

    broken = nodes.train("broken", on_line=kill_in_time)
    assert killed
    assert broken["output"]["steps"] == STEPS
    assert broken["progress"]["resumed_from_step"] >= LOST_AT - SAVE_EVERY
    a, b = nodes.adapter(broken), nodes.adapter(unbroken)
    assert a.keys() == b.keys()
    difference = max(float((a[name] - b[name]).abs().max()) for name in a)
    sys.stdout.write(f"lost at step {killed[0]}, resumed from {broken['progress']['resumed_from_step']}, ")
    sys.stdout.write(f"largest difference {difference:.2e}\n")
    assert difference < 1e-4
