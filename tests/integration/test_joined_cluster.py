"""An instance in a Ray cluster that is not its own: it ends what it started there, and nothing else."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve_app.stack.control import ReportedFailure
from serve_app.stack.instance import wait_until_ended
from serve_app.stack.ports import any_free
from tests.integration.instance import REPOSITORY, Home, temporary_home

pytestmark = pytest.mark.timeout(600)


class Cluster:
    """The program in `shared_cluster.py`."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self._log = (folder / "cluster.log").open("w")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.integration.shared_cluster", str(folder / "r")],
            env=environment, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
        )  # fmt: skip
        self.address = str(self._answer())

    def ask(self, command: str) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{command}\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("@"):
                return json.loads(line[1:])
        raise AssertionError(Path(self._log.name).read_text()[-3000:])

    def end(self) -> None:
        self._process.communicate(timeout=120)
        self._log.close()


@pytest.fixture
def home() -> Iterator[Home]:
    with temporary_home() as home:
        # Ray's own processes find the token of the cluster, which it made at its start, only when told to look.
        home.environment |= {"RAY_AUTH_MODE": "token"}
        yield home


@pytest.fixture
def cluster(home: Home) -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="rl", dir="/tmp"))
    environment = {k: v for k, v in {**os.environ, **home.environment}.items() if not k.startswith("RAY_AUTH")}
    cluster = Cluster(folder, environment)
    home.environment["RAYLORA_RAY_ADDRESS"] = cluster.address
    yield cluster
    cluster.end()
    shutil.rmtree(folder, ignore_errors=True)


def test_an_instance_ends_its_own_and_leaves_what_is_not(home: Home, cluster: Cluster) -> None:
    first = home.start()
    answer = httpx.get(f"{first.url}/-/healthz", headers={"x-request-id": "?"})
    assert answer.headers["x-request-id"] != "?", "the proxy lacks the middlewares"
    cluster.ask("deploy")
    with temporary_home() as other, pytest.raises(ReportedFailure) as refused:
        other.start({**home.environment, "RAYLORA_HOME": str(other.instance.home)})
    assert refused.value.code == "cluster_in_use"
    assert cluster.ask("applications") == ["neighbour", "raylora"]
    assert cluster.ask("training_slots") == 1

    # What a killed instance leaves is replaced by the next, whose settings count.
    supervisor = first.instance.supervisor()
    assert supervisor is not None
    supervisor.kill()
    assert wait_until_ended(supervisor, 60)
    second = home.start({"RAYLORA_TRAINING_SLOTS": "2", "RAYLORA_S3_BUCKET": "other"})
    assert cluster.ask("training_slots") == 2
    with second.client() as client:
        assert client.call("health")["services"]["storage"]["ok"]

    home.stop()

    assert cluster.ask("applications") == ["neighbour"]
    assert cluster.ask("actors") == []
    assert httpx.get(f"{first.url}/neighbour").text == "still here"
    with pytest.raises(ReportedFailure) as refused:
        home.start({"RAYLORA_PORT": str(any_free())})
    assert refused.value.code == "serve_elsewhere"
    assert cluster.ask("applications") == ["neighbour"]
