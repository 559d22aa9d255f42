from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.errors import RecordsUnavailable
from storage.job_record import LAUNCHER_OWNER, SETTLED_BY_SUPERVISOR, JobRecord
from storage.job_state import JobKind, JobState
from storage.jobs_config import JobsConfig
from storage.jobs_testing import JobsWorld, ScriptedLauncher
from storage.settings import RecordsSettings, S3Settings
from storage.training_queue import TrainingQueue

TRAINING = JobKind.TRAINING


class Cluster(JobsWorld):
    """A queue over a world, and a driver to play."""

    def __init__(self, folder: Path) -> None:
        self.launcher = ScriptedLauncher()
        self.slots = 1
        super().__init__(folder)

    def _open(self) -> None:
        super()._open()
        self.config = JobsConfig(
            records=RecordsSettings(url=self.url), s3=S3Settings(), training_slots=self.slots, submit_attempts_max=3
        )
        self.queue = TrainingQueue(self.jobs, self.launcher, self.config, clock=self.clock)

    def training(self, **fields: object) -> JobRecord:
        return self.create(TRAINING, **fields)

    def submitted(self, **fields: object) -> JobRecord:
        record = self.training(**fields)
        self.queue.run_once()
        return self.jobs.get(record.id)

    def driven(self, **fields: object) -> JobRecord:
        """A training whose driver is at work."""
        record = self.submitted(**fields)
        return self.drive(record)

    def drive(self, record: JobRecord) -> JobRecord:
        assert record.submission_id is not None
        self.launcher.statuses[record.submission_id] = "RUNNING"
        self.jobs.adopt(record.id, f"driver of {record.submission_id}", 30, submission_id=record.submission_id)
        return self.jobs.start(record.id, f"driver of {record.submission_id}")

    def ends(self, submission_id: str | None, status: str) -> None:
        assert submission_id is not None
        self.launcher.statuses[submission_id] = status


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path)
    yield cluster
    cluster.close()


def test_a_queued_training_is_noted_and_submitted(cluster: Cluster):
    record = cluster.submitted()
    assert (record.state, record.lease_owner, record.submission_id) == (JobState.STARTING, LAUNCHER_OWNER, record.id)
    assert cluster.launcher.submitted == [record.id]
    cluster.queue.run_once()
    assert cluster.launcher.submitted == [record.id]


def test_a_clock_that_moves_between_two_looks_at_it_changes_nothing(cluster: Cluster):
    record = cluster.training()

    def ticking():
        cluster.clock.advance(0.001)
        return cluster.clock.now

    queue = TrainingQueue(cluster.jobs, cluster.launcher, cluster.config, clock=ticking)
    queue.run_once()
    assert cluster.launcher.submitted == [record.id]


def test_a_generation_is_left_alone(cluster: Cluster):
    cluster.create(JobKind.GENERATION)
    cluster.queue.run_once()
    assert cluster.launcher.submitted == []


def test_no_more_trainings_run_than_there_are_slots(cluster: Cluster):
    cluster.slots = 2
    cluster.restart()
    first, second, third = (cluster.training() for _ in range(3))
    cluster.queue.run_once()
    assert cluster.launcher.submitted == [first.id, second.id]
    cluster.jobs.complete(cluster.drive(cluster.jobs.get(first.id)).id, f"driver of {first.id}", {})
    cluster.ends(first.id, "SUCCEEDED")
    cluster.queue.run_once()
    cluster.queue.run_once()
    assert cluster.launcher.submitted == [first.id, second.id, third.id]


def test_a_training_that_waits_for_resources_keeps_its_place(cluster: Cluster):
    record = cluster.submitted()
    for _ in range(100):
        cluster.clock.advance(20)
        cluster.queue.run_once()
        assert cluster.jobs.reap() == []
    assert cluster.jobs.get(record.id).state is JobState.STARTING
    assert cluster.launcher.submitted == [record.id]


def test_a_training_that_its_driver_finished_is_closed(cluster: Cluster):
    record = cluster.driven()
    done = cluster.jobs.complete(record.id, f"driver of {record.id}", {"loras": []})
    cluster.ends(record.id, "SUCCEEDED")
    cluster.queue.run_once()
    assert cluster.jobs.get(record.id) == done
    assert cluster.jobs.submissions() == []
    assert cluster.launcher.stopped == []


@pytest.mark.parametrize("status", ["FAILED", "STOPPED", "SUCCEEDED"])
def test_a_driver_that_ends_without_a_result_is_resumed_under_a_new_submission(cluster: Cluster, status: str):
    record = cluster.driven()
    cluster.ends(record.id, status)
    cluster.queue.run_once()
    again = cluster.jobs.get(record.id)
    assert (again.state, again.attempt) == (JobState.QUEUED, 2)
    cluster.queue.run_once()
    assert cluster.launcher.submitted == [record.id, f"{record.id}-r2"]
    resumed = cluster.drive(cluster.jobs.get(record.id))
    assert (resumed.state, resumed.submission_id) == (JobState.RUNNING, f"{record.id}-r2")


def test_a_training_that_keeps_dying_fails_with_a_reason(cluster: Cluster):
    record = cluster.training(attempts_max=2)
    for _ in range(2):
        cluster.queue.run_once()
        cluster.ends(cluster.drive(cluster.jobs.get(record.id)).submission_id, "FAILED")
        cluster.queue.run_once()
    ended = cluster.jobs.get(record.id)
    assert (ended.state, ended.settled_by) == (JobState.FAILED, SETTLED_BY_SUPERVISOR)
    assert ended.error is not None
    assert ended.error.code == "training_interrupted"
    assert ended.error.message.endswith("The job was given up after 2 attempts.")
    cluster.queue.run_once()
    assert cluster.jobs.submissions() == []


def test_a_retry_of_a_failed_training_gets_a_submission_of_its_own(cluster: Cluster):
    record = cluster.driven()
    cluster.jobs.fail(record.id, f"driver of {record.id}", "bad_data", "No pictures.")
    cluster.ends(record.id, "FAILED")
    cluster.queue.run_once()
    cluster.jobs.retry(record.id, tenant="default")
    cluster.queue.run_once()
    assert cluster.launcher.submitted == [record.id, f"{record.id}-r2"]


def test_a_lost_lease_stops_the_old_driver_before_the_next_begins(cluster: Cluster):
    record = cluster.driven()
    cluster.clock.advance(31)
    cluster.jobs.reap()
    for _ in range(3):
        cluster.queue.run_once()
    assert cluster.launcher.stopped == [record.id]
    assert cluster.launcher.submitted == [record.id]
    cluster.ends(record.id, "STOPPED")
    cluster.queue.run_once()
    cluster.queue.run_once()
    assert cluster.launcher.submitted == [record.id, f"{record.id}-r2"]


def test_with_a_free_slot_too_the_next_attempt_waits_for_the_end_of_the_last(cluster: Cluster):
    cluster.slots = 3
    cluster.restart()
    record = cluster.driven()
    cluster.clock.advance(31)
    cluster.jobs.reap()
    for _ in range(5):
        cluster.clock.advance(20)
        cluster.queue.run_once()
        assert cluster.jobs.reap() == []
    assert cluster.launcher.submitted == [record.id]
    assert cluster.jobs.get(record.id).lease_owner == LAUNCHER_OWNER
    cluster.ends(record.id, "STOPPED")
    cluster.queue.run_once()
    cluster.queue.run_once()
    assert cluster.launcher.submitted == [record.id, f"{record.id}-r2"]


def test_a_stop_that_has_no_effect_is_repeated_but_not_at_every_pass(cluster: Cluster):
    record = cluster.driven()
    cluster.jobs.interrupt(record.id, record.id, "code", "text")
    for _ in range(4):
        cluster.clock.advance(10)
        cluster.queue.run_once()
    assert cluster.launcher.stopped == [record.id] * 2


def test_a_driver_that_settled_its_record_is_given_time_to_end(cluster: Cluster):
    record = cluster.driven()
    cluster.jobs.complete(record.id, f"driver of {record.id}", {})
    cluster.clock.advance(59)
    cluster.queue.run_once()
    assert cluster.launcher.stopped == []
    cluster.clock.advance(1)
    cluster.queue.run_once()
    assert cluster.launcher.stopped == [record.id]


def test_a_cancel_before_the_driver_came_is_settled_and_its_ray_job_stopped(cluster: Cluster):
    record = cluster.submitted()
    cluster.jobs.request_cancel(record.id, tenant="default")
    cluster.queue.run_once()
    assert cluster.jobs.get(record.id).state is JobState.CANCELLED
    assert cluster.launcher.stopped == [record.id]


def test_a_driver_is_left_to_settle_a_cancel_and_stopped_after_the_grace(cluster: Cluster):
    record = cluster.driven()
    cluster.jobs.request_cancel(record.id, tenant="default")
    cluster.queue.run_once()
    assert cluster.launcher.stopped == []
    cluster.clock.advance(cluster.policy.cancel_grace_s)
    cluster.jobs.heartbeat(record.id, f"driver of {record.id}")
    cluster.jobs.reap()
    cluster.queue.run_once()
    assert cluster.jobs.get(record.id).state is JobState.CANCELLED
    assert cluster.launcher.stopped == [record.id]


def test_a_driver_that_dies_after_a_cancel_leaves_the_job_cancelled(cluster: Cluster):
    record = cluster.driven()
    cluster.jobs.request_cancel(record.id, tenant="default")
    cluster.ends(record.id, "FAILED")
    cluster.queue.run_once()
    assert cluster.jobs.get(record.id).state is JobState.CANCELLED


def test_a_driver_that_never_comes_to_work_costs_an_attempt(cluster: Cluster):
    record = cluster.submitted()
    cluster.ends(record.id, "RUNNING")
    cluster.queue.run_once()
    for _ in range(15):
        cluster.clock.advance(20)
        cluster.queue.run_once()
    assert cluster.jobs.get(record.id).attempt == 2
    cluster.queue.run_once()
    assert cluster.launcher.stopped == [record.id]


def test_a_submission_that_fails_is_tried_again_later_without_costing_an_attempt(cluster: Cluster):
    cluster.launcher.submit_error = ConnectionError("refused")
    record = cluster.submitted()
    cluster.launcher.submit_error = None
    cluster.queue.run_once()
    assert cluster.launcher.submitted == []
    cluster.clock.advance(2)
    cluster.queue.run_once()
    assert cluster.launcher.submitted == [record.id]
    assert cluster.jobs.get(record.id).attempt == 1


def test_a_submission_that_never_works_fails_the_training(cluster: Cluster):
    cluster.launcher.submit_error = ConnectionError("refused")
    record = cluster.submitted()
    for _ in range(3):
        cluster.clock.advance(20)
        cluster.queue.run_once()
    ended = cluster.jobs.get(record.id)
    assert ended.state is JobState.FAILED
    assert ended.error is not None
    assert ended.error.code == "training_submit_failed"
    assert "refused" not in ended.error.message
    cluster.queue.run_once()
    assert cluster.jobs.submissions() == []


def test_a_submission_that_worked_though_it_raised_is_not_repeated(cluster: Cluster):
    record = cluster.training()
    cluster.launcher.submit_error = TimeoutError()
    cluster.queue.run_once()
    cluster.launcher.submit_error = None
    cluster.launcher.statuses[record.id] = "PENDING"
    cluster.clock.advance(10)
    cluster.queue.run_once()
    assert cluster.launcher.submitted == []
    assert cluster.jobs.get(record.id).state is JobState.STARTING


def test_a_cluster_that_cannot_be_asked_costs_nothing(cluster: Cluster):
    record, other = cluster.submitted(), cluster.training()
    cluster.launcher.status_error = ConnectionError("refused")
    for _ in range(5):
        cluster.clock.advance(20)
        cluster.queue.run_once()
        assert cluster.jobs.reap() == []
    assert cluster.jobs.get(record.id).attempt == 1
    assert cluster.jobs.get(other.id).state is JobState.QUEUED


def test_a_driver_with_a_live_lease_is_believed_when_the_cluster_forgot_its_job(cluster: Cluster):
    record = cluster.driven()
    del cluster.launcher.statuses[record.id]
    cluster.clock.advance(29)
    cluster.queue.run_once()
    assert cluster.jobs.get(record.id).state is JobState.RUNNING
    cluster.clock.advance(1)
    cluster.queue.run_once()
    assert cluster.jobs.get(record.id).attempt == 2


def test_after_a_restart_a_running_training_is_found_again(cluster: Cluster):
    record = cluster.driven()
    cluster.restart()
    cluster.queue.run_once()
    assert cluster.jobs.get(record.id).state is JobState.RUNNING
    cluster.ends(record.id, "FAILED")
    cluster.queue.run_once()
    assert cluster.jobs.get(record.id).attempt == 2


def test_a_restart_between_claim_and_note_loses_nothing(cluster: Cluster):
    record = cluster.training()
    cluster.jobs.claim(TRAINING, LAUNCHER_OWNER)
    cluster.restart()
    cluster.queue.run_once()
    assert cluster.launcher.submitted == [record.id]


def test_a_restart_between_note_and_submission_loses_nothing(cluster: Cluster):
    record = cluster.training()
    cluster.jobs.claim(TRAINING, LAUNCHER_OWNER)
    cluster.jobs.attach(record.id, owner=LAUNCHER_OWNER, submission_id=record.id)
    cluster.restart()
    cluster.queue.run_once()
    assert cluster.launcher.submitted == [record.id]
    assert cluster.jobs.get(record.id).attempt == 1


def test_a_restart_between_submission_and_anything_else_submits_no_second_time(cluster: Cluster):
    record = cluster.submitted()
    cluster.restart()
    cluster.queue.run_once()
    assert cluster.launcher.submitted == [record.id]


def test_a_training_that_came_with_its_ray_job_is_watched_and_resumed_like_any_other(cluster: Cluster):
    cluster.launcher.statuses["raysubmit_1"] = "RUNNING"
    record = cluster.training(source="ray", owner="driver", submission_id="raysubmit_1")
    cluster.jobs.start(record.id, "driver")
    cluster.queue.run_once()
    assert cluster.launcher.submitted == []
    cluster.ends("raysubmit_1", "FAILED")
    cluster.queue.run_once()
    cluster.queue.run_once()
    assert cluster.launcher.submitted == [f"{record.id}-r2"]


def test_trouble_with_one_ray_job_holds_up_no_other(cluster: Cluster):
    cluster.slots = 2
    cluster.restart()
    first, second = cluster.driven(), cluster.driven()

    def stop(_: str) -> None:
        raise ConnectionError

    cluster.launcher.stop = stop
    for record in (first, second):
        cluster.jobs.interrupt(record.id, record.id, "code", "text")
    cluster.ends(second.id, "STOPPED")
    cluster.queue.run_once()
    assert [submission.submission_id for submission in cluster.jobs.submissions()] == [first.id]


def test_trouble_with_the_records_ends_the_pass(cluster: Cluster):
    cluster.submitted()

    def get(_: str) -> None:
        raise RecordsUnavailable("get")

    cluster.jobs.get = get
    with pytest.raises(RecordsUnavailable):
        cluster.queue.run_once()
