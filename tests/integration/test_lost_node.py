"""A node that is lost in the middle of a training: the raylet of a node of a local cluster is killed with -9.

Two trainings on a cluster of its own take minutes, and the process must not have joined another one:
`RAYLORA_TEST_LOST_NODE=1 pytest tests/integration/test_lost_node.py`.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load

from serve_app.stack.ports import any_free
from storage.embedded import EmbeddedS3
from storage.keys import Keys
from tests.integration.instance import REPOSITORY

PICTURES = REPOSITORY / "examples" / "zib" / "images"
STEPS, SAVE_EVERY = 60, 4
PATIENCE_S = 300.0
POLL_S = 0.05

pytestmark = [
    pytest.mark.skipif("RAYLORA_TEST_LOST_NODE" not in os.environ, reason="RAYLORA_TEST_LOST_NODE=1 runs it, alone"),
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
    # A node whose raylet is gone leaves its sockets to the garbage collector.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@dataclass
class Nodes:
    """A head without room for workers, and nodes with room for one each."""

    cluster: Any
    environment: dict[str, str]
    folder: Path
    store: Any
    kept: Path
    alive: list[Any] = field(default_factory=list)

    def add(self) -> None:
        self.alive.append(self.cluster.add_node(num_cpus=1))

    def lose_oldest(self) -> None:
        """Kill its raylet, and take away what it kept on its disk."""
        node = self.alive.pop(0)
        raylet = node.all_processes["raylet"][0].process
        raylet.kill()
        raylet.wait(timeout=30)
        shutil.rmtree(self.kept, ignore_errors=True)

    def train(
        self, name: str, *, workers_max: int = 1, on_checkpoint: Callable[[], None] = lambda: None
    ) -> dict[str, Any]:
        """Run a training to its end; `on_checkpoint` is called when the first one is there. Returns output, progress
        and how many workers it had from start to start."""
        spec = {
            "name": name, "model": "tiny", "datasets": [{"local_path": str(PICTURES), "resolutions_px": [64]}],
            "network": {"rank": 4, "dropout": 0.1}, "workers": {"min": 1, "max": workers_max},
            "train": {"steps": STEPS, "batch_size": 2, "learning_rate": 1e-3, "dtype": "fp32"},
            "save": {"every_steps": SAVE_EVERY, "keep": 2, "dtype": "fp32"},
        }  # fmt: skip
        config, log_path = self.folder / f"{name}.json", self.folder / f"{name}.log"
        config.write_text(json.dumps(spec))
        command = [sys.executable, "-m", "train_jobs.run", "--config", str(config)]
        said: list[str] = []
        with (
            log_path.open("w") as log,
            subprocess.Popen(command, env=self.environment, stdout=subprocess.PIPE, stderr=log, text=True) as driver,
        ):
            reader = threading.Thread(target=lambda: said.extend(line.strip() for line in driver.stdout or ()))
            reader.start()
            try:
                self._watch(said, driver, on_checkpoint)
                status = driver.wait(timeout=PATIENCE_S)
            finally:
                driver.kill()
                reader.join()
        assert status == 0, "\n".join([*said[-5:], log_path.read_text()[-3000:]])
        from storage.blocking_jobs import BlockingJobs

        jobs = BlockingJobs()
        record = jobs.get(said[0].removeprefix("process "))
        jobs.close()
        sizes = re.findall(r"Started training worker group of size (\d+)", log_path.read_text())
        return {"output": record.output, "progress": record.progress, "workers": [int(size) for size in sizes]}

    def _watch(self, said: list[str], driver: subprocess.Popen[str], on_checkpoint: Callable[[], None]) -> None:
        keys, until = Keys("raylora", "default"), time.monotonic() + PATIENCE_S
        while driver.poll() is None and time.monotonic() < until:
            prefix = keys.checkpoints_prefix(said[0].removeprefix("process ")) if said else None
            if prefix is not None and any(i.key.endswith("state.json") for i in asyncio.run(self.store.list(prefix))):
                on_checkpoint()
                return
            time.sleep(POLL_S)

    def adapter(self, record: dict[str, Any]) -> dict[str, Any]:
        return load(asyncio.run(self.store.get(record["output"]["loras"][0]["key"])))


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    home = Path(tempfile.mkdtemp(prefix="rl", dir="/tmp"))
    cpus = os.sched_getaffinity(0)
    # The nodes are one machine, whose CPUs the workers share out: with the number of threads, and so of workers, the
    # rounding of every sum would change, which Adam makes 5e-3 of within 120 steps. On one CPU it cannot.
    os.sched_setaffinity(0, {min(cpus)})
    with pytest.MonkeyPatch.context() as patch, EmbeddedS3(tmp_path / "s3", 0) as s3:
        patch.setenv("HOME", str(home))
        # Ray notes the newest cluster of a machine there; others on this one must not join it.
        (home / "ray").mkdir()
        (home / "scratch").mkdir()
        patch.setenv("RAY_TMPDIR", str(home))
        # A worker whose node is lost cannot clear its scratch away.
        patch.setenv("TMPDIR", str(home / "scratch"))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]))
        import ray
        from ray.cluster_utils import Cluster

        from storage.actor import StorageClient
        from storage.jobs_actor import ensure_jobs_actor
        from storage.jobs_config import JobsConfig
        from storage.settings import RecordsSettings
        from train_jobs.run import KEPT_FOLDER

        head = {"num_cpus": 0, "include_dashboard": False, "temp_dir": str(home / "r"), "gcs_server_port": any_free()}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
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
            environment = {**os.environ, "RAY_ADDRESS": cluster.address}
            yield Nodes(cluster, environment, tmp_path, store, home / KEPT_FOLDER)
        finally:
            ray.shutdown()
            cluster.shutdown()
            os.sched_setaffinity(0, cpus)
            shutil.rmtree(home, ignore_errors=True)


def test_a_training_goes_on_upon_another_node_to_the_very_same_adapter(nodes: Nodes) -> None:
    nodes.add()
    unbroken = nodes.train("unbroken")
    assert "resumed_from_step" not in unbroken["progress"]

    def lose_its_node() -> None:
        nodes.lose_oldest()
        nodes.add()

    broken = nodes.train("broken", on_checkpoint=lose_its_node)
    assert broken["workers"] == [1, 1]
    assert_same(nodes, broken, unbroken)


def test_an_elastic_training_goes_on_with_the_worker_that_is_left_to_the_very_same_adapter(nodes: Nodes) -> None:
    nodes.add()
    unbroken = nodes.train("unbroken", workers_max=2)
    assert unbroken["workers"] == [1]
    nodes.add()
    broken = nodes.train("broken", workers_max=2, on_checkpoint=nodes.lose_oldest)
    assert (broken["workers"][0], broken["workers"][-1]) == (2, 1)
    assert_same(nodes, broken, unbroken)


def assert_same(nodes: Nodes, broken: dict[str, Any], unbroken: dict[str, Any]) -> None:
    assert broken["output"]["steps"] == STEPS
    assert SAVE_EVERY <= broken["progress"]["resumed_from_step"] < STEPS
    ours, theirs = nodes.adapter(broken), nodes.adapter(unbroken)
    assert ours.keys() == theirs.keys()
    # The same sums in the same order: the samples, noise and dropout of a step do not depend on where it is computed.
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) < 1e-6
