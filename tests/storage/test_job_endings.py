"""How jobs end that do not simply complete: cancelled, lost, out of time, adopted."""

import pytest

from storage.errors import (
    JobNotCancellable,
    JobNotRetryable,
    LeaseLost,
)
from storage.job_record import LAUNCHER_OWNER, SETTLED_BY_SWEEP
from storage.job_state import JobKind, JobState
from storage.jobs_testing import JobsWorld

GENERATION, TRAINING = JobKind.GENERATION, JobKind.TRAINING


# --- cancel, retry, purge


def test_a_queued_job_is_cancelled_at_once(world: JobsWorld):
    record = world.create()
    assert world.jobs.request_cancel(record.id, tenant="default").state is JobState.CANCELLED
    assert world.jobs.claim(GENERATION, "w1") == []


def test_the_owner_of_running_work_is_asked_and_settles_it(world: JobsWorld):
    record = world.running("w1")
    asked = world.jobs.request_cancel(record.id, tenant="default")
    assert (asked.state, asked.cancel_requested) == (JobState.RUNNING, True)
    assert world.jobs.request_cancel(record.id, tenant="default") == asked
    assert world.jobs.heartbeat(record.id, "w1").cancel_requested
    ended = world.jobs.cancelled(record.id, "w1", {"checkpoint": "k"})
    assert (ended.state, ended.output) == (JobState.CANCELLED, {"checkpoint": "k"})
    assert world.jobs.request_cancel(record.id, tenant="default") == ended


def test_a_cancel_that_nobody_answers_is_settled_after_its_grace(world: JobsWorld):
    record = world.running("w1")
    world.jobs.request_cancel(record.id, tenant="default")
    world.clock.advance(world.policy.cancel_grace_s - 1)
    world.jobs.heartbeat(record.id, "w1")
    assert world.jobs.reap() == []
    world.clock.advance(1)
    [ended] = world.jobs.reap()
    assert (ended.state, ended.settled_by) == (JobState.CANCELLED, SETTLED_BY_SWEEP)


def test_an_interrupted_job_that_was_to_be_cancelled_is_cancelled(world: JobsWorld):
    record = world.running("w1")
    world.jobs.request_cancel(record.id, tenant="default")
    assert world.jobs.fail(record.id, "w1", "broken", "It broke.", retryable=True).state is JobState.CANCELLED


def test_ended_work_cannot_be_cancelled(world: JobsWorld):
    record = world.running("w1")
    world.jobs.complete(record.id, "w1", {})
    with pytest.raises(JobNotCancellable):
        world.jobs.request_cancel(record.id, tenant="default")


def test_a_retry_queues_a_failed_job_with_one_more_attempt(world: JobsWorld):
    record = world.running("w1", attempts_max=1)
    world.jobs.fail(record.id, "w1", "broken", "It broke.", retryable=True)
    world.clock.advance(60)
    again = world.jobs.retry(record.id, tenant="default")
    assert (again.state, again.attempt, again.attempts_max) == (JobState.QUEUED, 2, 2)
    assert (again.error, again.finished_at, again.settled_by) == (None, None, None)
    assert again.queued_at == world.clock.now
    assert again.created_at == record.created_at


def test_only_failed_and_timed_out_jobs_are_retried(world: JobsWorld):
    queued, running = world.create(priority=-1), world.running("w1")
    done = world.running("w2", priority=1)
    world.jobs.complete(done.id, "w2", {})
    gone = world.create(priority=-2)
    world.jobs.request_cancel(gone.id, tenant="default")
    for record in (queued, running, done, gone):
        with pytest.raises(JobNotRetryable):
            world.jobs.retry(record.id, tenant="default")


def test_a_purge_cancels_what_is_queued_and_nothing_else(world: JobsWorld):
    running = world.running("w1")
    queued, other = world.create(), world.create(tenant="other")
    assert world.jobs.purge_queue("default") == 1
    assert world.jobs.get(queued.id).state is JobState.CANCELLED
    assert world.jobs.get(running.id).state is JobState.RUNNING
    assert world.jobs.get(other.id).state is JobState.QUEUED


# --- leases and time limits


def test_a_lost_lease_is_queued_again_and_finally_fails_with_its_reason(world: JobsWorld):
    job_id = world.create(attempts_max=2).id
    world.jobs.claim(GENERATION, "w1", lease_s=30)
    world.clock.advance(30)
    [swept] = world.jobs.reap()
    assert (swept.state, swept.attempt, swept.lease_owner) == (JobState.QUEUED, 2, None)
    world.jobs.claim(GENERATION, "w2", lease_s=30)
    with pytest.raises(LeaseLost):
        world.jobs.heartbeat(job_id, "w1")
    world.clock.advance(30)
    [swept] = world.jobs.reap()
    assert swept.state is JobState.FAILED
    assert swept.error is not None
    assert swept.error.code == "lease_lost"
    assert world.jobs.reap() == []


def test_a_lease_that_ran_out_and_was_not_taken_can_be_renewed(world: JobsWorld):
    record = world.running("w1")
    world.clock.advance(1000)
    world.jobs.heartbeat(record.id, "w1")
    assert world.jobs.reap() == []


def test_work_out_of_time_is_asked_first_and_ended_after_the_grace(world: JobsWorld):
    record = world.running("w1", timeout_s=100)
    world.clock.advance(99)
    assert not world.jobs.heartbeat(record.id, "w1", lease_s=300).timed_out
    world.clock.advance(1)
    assert world.jobs.heartbeat(record.id, "w1", lease_s=300).timed_out
    assert world.jobs.reap() == []
    world.clock.advance(world.policy.timeout_grace_s)
    [ended] = world.jobs.reap()
    assert ended.state is JobState.TIMED_OUT
    assert ended.error is not None
    assert ended.error.message == "The job did not end within 100 seconds."


def test_the_owner_can_end_its_work_as_timed_out_and_keep_a_result(world: JobsWorld):
    record = world.running("w1", timeout_s=100)
    ended = world.jobs.timed_out(record.id, "w1", {"checkpoint": "k"})
    assert (ended.state, ended.output) == (JobState.TIMED_OUT, {"checkpoint": "k"})
    assert world.jobs.timed_out(record.id, "w1") == ended


def test_work_interrupted_after_its_time_is_timed_out_and_not_queued(world: JobsWorld):
    record = world.running("w1", timeout_s=10)
    world.clock.advance(31)
    [ended] = world.jobs.reap()
    assert (ended.id, ended.state) == (record.id, JobState.TIMED_OUT)


def test_a_job_that_waits_longer_than_its_ttl_is_timed_out(world: JobsWorld):
    record = world.create(ttl_s=50)
    world.clock.advance(49)
    assert world.jobs.reap() == []
    world.clock.advance(1)
    [ended] = world.jobs.reap()
    assert (ended.id, ended.state) == (record.id, JobState.TIMED_OUT)
    again = world.jobs.retry(record.id, tenant="default")
    assert again.state is JobState.QUEUED
    assert world.jobs.reap() == []


# --- trainings: adoption and submissions


def test_a_driver_adopts_the_lease_of_the_training_queue(world: JobsWorld):
    record = world.claimed(LAUNCHER_OWNER, TRAINING)
    world.jobs.attach(record.id, owner=LAUNCHER_OWNER, submission_id=record.id)
    adopted = world.jobs.adopt(record.id, "driver-1", 30, submission_id=record.id)
    assert (adopted.state, adopted.lease_owner, adopted.submission_id) == (JobState.STARTING, "driver-1", record.id)
    assert world.jobs.adopt(record.id, "driver-1", 30).lease_owner == "driver-1"
    with pytest.raises(LeaseLost):
        world.jobs.adopt(record.id, "driver-2", 30)
    with pytest.raises(LeaseLost):
        world.jobs.heartbeat(record.id, LAUNCHER_OWNER)


def test_a_lease_that_ran_out_can_be_adopted(world: JobsWorld):
    record = world.running("driver-1", TRAINING)
    world.clock.advance(30)
    adopted = world.jobs.adopt(record.id, "driver-2", 30)
    assert (adopted.state, adopted.lease_owner) == (JobState.RUNNING, "driver-2")


def test_a_queued_training_can_be_adopted_by_hand(world: JobsWorld):
    record = world.create(TRAINING)
    assert world.jobs.adopt(record.id, "driver", 30).state is JobState.STARTING
    assert world.jobs.claim(TRAINING, LAUNCHER_OWNER) == []


def test_the_driver_of_an_attempt_that_was_given_up_cannot_come_back(world: JobsWorld):
    record = world.claimed(LAUNCHER_OWNER, TRAINING)
    world.jobs.attach(record.id, owner=LAUNCHER_OWNER, submission_id=record.id)
    world.jobs.interrupt(record.id, record.id, "training_interrupted", "It ended.")
    with pytest.raises(LeaseLost):
        world.jobs.adopt(record.id, "zombie", 30, submission_id=record.id)
    world.jobs.claim(TRAINING, LAUNCHER_OWNER)
    world.jobs.attach(record.id, owner=LAUNCHER_OWNER, submission_id=f"{record.id}-r2")
    with pytest.raises(LeaseLost):
        world.jobs.adopt(record.id, "zombie", 30, submission_id=record.id)
    assert world.jobs.adopt(record.id, "driver-2", 30, submission_id=f"{record.id}-r2").lease_owner == "driver-2"


def test_ended_work_cannot_be_adopted(world: JobsWorld):
    record = world.running("w1", TRAINING)
    world.jobs.complete(record.id, "w1", {})
    with pytest.raises(LeaseLost):
        world.jobs.adopt(record.id, "w1", 30)


def test_a_job_that_comes_with_its_ray_job_is_claimed_from_the_start(world: JobsWorld):
    record = world.create(TRAINING, source="ray", owner="driver", submission_id="raysubmit_1")
    assert (record.state, record.lease_owner) == (JobState.STARTING, "driver")
    assert world.jobs.claim(TRAINING, LAUNCHER_OWNER) == []
    assert [submission.submission_id for submission in world.jobs.submissions()] == ["raysubmit_1"]


def test_submissions_are_remembered_until_they_are_closed(world: JobsWorld):
    record = world.claimed(LAUNCHER_OWNER, TRAINING)
    world.jobs.attach(record.id, owner=LAUNCHER_OWNER, submission_id="s1")
    world.restart()
    assert [submission.job_id for submission in world.jobs.submissions()] == [record.id]
    world.jobs.close_submission("s1")
    assert world.jobs.submissions() == []
