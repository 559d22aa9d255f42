from __future__ import annotations

import os
import pickle
import shlex
from pathlib import Path
from typing import Any

import pytest
from ray.job_submission import JobStatus

from train_jobs.launcher import RayJobLauncher, python_path

JOB = "train_0123456789ab"
MISSING = RuntimeError("Request failed with status code 404: Job does not exist.")


class Cluster:
    """Answers as Ray's JobSubmissionClient does."""

    def __init__(self) -> None:
        self.jobs: dict[str, dict[str, Any]] = {}
        self.stopped: list[str] = []
        self.lose_reply = False
        self.down: Exception | None = None

    def submit_job(self, **job: Any) -> str:
        if self.down:
            raise self.down
        if job["submission_id"] in self.jobs:
            raise RuntimeError("Request failed with status code 500: Job with submission_id already exists.")
        self.jobs[job["submission_id"]] = job
        if self.lose_reply:
            raise RuntimeError("Request failed with status code 502: bad gateway.")
        return str(job["submission_id"])

    def get_job_status(self, submission_id: str) -> JobStatus:
        if submission_id not in self.jobs:
            raise MISSING
        return JobStatus.RUNNING

    def stop_job(self, submission_id: str) -> bool:
        if self.down:
            raise self.down
        if submission_id not in self.jobs:
            raise MISSING
        self.stopped.append(submission_id)
        return True


@pytest.fixture
def cluster() -> Cluster:
    return Cluster()


@pytest.fixture
def launcher(cluster: Cluster) -> RayJobLauncher:
    return RayJobLauncher(
        "http://127.0.0.1:8265", python="/opt/my python", env={"RAYLORA_X": "1"}, client_factory=lambda _: cluster
    )


def test_the_entrypoint_holds_nothing_but_the_jobs_id(launcher: RayJobLauncher, cluster: Cluster) -> None:
    assert launcher.submit(JOB, 1) == JOB
    job = cluster.jobs[JOB]
    assert shlex.split(job["entrypoint"]) == ["/opt/my python", "-m", "train_jobs.run", "--process-id", JOB]
    assert job["metadata"]["process_id"] == JOB
    assert JOB in job["metadata"]["name"]
    assert "entrypoint_num_gpus" not in job


def test_a_job_gets_time_to_save_its_work(launcher: RayJobLauncher, cluster: Cluster) -> None:
    launcher.submit(JOB, 1)
    env = cluster.jobs[JOB]["runtime_env"]["env_vars"]
    assert (env["RAY_JOB_STOP_SIGNAL"], env["RAY_JOB_STOP_WAIT_TIME_S"]) == ("SIGINT", "20")
    assert env["RAYLORA_X"] == "1"
    assert (Path(env["PYTHONPATH"].split(os.pathsep)[0]) / "train_jobs" / "run.py").is_file()


@pytest.mark.parametrize("job_id", ["x; rm -rf /", "train_0123456789ab\n", "gen", ""])
def test_what_is_no_job_id_is_not_submitted(launcher: RayJobLauncher, cluster: Cluster, job_id: str) -> None:
    with pytest.raises(ValueError, match="not a job id"):
        launcher.submit(job_id, 1)
    assert not cluster.jobs


def test_each_attempt_has_its_own_submission(launcher: RayJobLauncher, cluster: Cluster) -> None:
    launcher.submit(JOB, 1)
    assert launcher.submit(JOB, 2) != JOB
    assert len(cluster.jobs) == 2


def test_an_attempt_is_submitted_once(launcher: RayJobLauncher, cluster: Cluster) -> None:
    assert launcher.submit(JOB, 1) == launcher.submit(JOB, 1)
    assert len(cluster.jobs) == 1


def test_a_lost_reply_is_not_a_failure(launcher: RayJobLauncher, cluster: Cluster) -> None:
    cluster.lose_reply = True
    assert launcher.submit(JOB, 1) == JOB


def test_a_cluster_that_refuses_is_an_error(launcher: RayJobLauncher, cluster: Cluster) -> None:
    cluster.down = RuntimeError("Request failed with status code 500: no.")
    with pytest.raises(RuntimeError):
        launcher.submit(JOB, 1)
    with pytest.raises(RuntimeError):
        launcher.stop(JOB)


def test_the_status_is_rays_word(launcher: RayJobLauncher) -> None:
    assert launcher.status(JOB) == "UNKNOWN"
    launcher.submit(JOB, 1)
    assert launcher.status(JOB) == "RUNNING"


def test_other_trouble_is_not_read_as_a_missing_job(launcher: RayJobLauncher, cluster: Cluster) -> None:
    def broken(_: str) -> JobStatus:
        raise RuntimeError("Request failed with status code 503: no.")

    cluster.get_job_status = broken  # type: ignore[method-assign]
    with pytest.raises(RuntimeError):
        launcher.status(JOB)


def test_stopping_what_is_not_there_is_fine(launcher: RayJobLauncher, cluster: Cluster) -> None:
    launcher.stop(JOB)
    launcher.submit(JOB, 1)
    launcher.stop(JOB)
    assert cluster.stopped == [JOB]


def test_a_launcher_can_be_pickled_without_its_connection() -> None:
    launcher = RayJobLauncher("http://127.0.0.1:8265", client_factory=Cluster)  # type: ignore[arg-type]
    copy = pickle.loads(pickle.dumps(launcher))  # noqa: S301
    assert copy.__dict__ == launcher.__dict__


def test_inherited_python_path_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    assert python_path(os.pathsep.join(["/a", "/b"])).split(os.pathsep)[1:] == ["/a", "/b"]
    assert python_path(python_path("")) == python_path("")
