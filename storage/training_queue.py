"""Trainings on the cluster: takes them from the queue, submits their Ray jobs, and watches these until they end."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Protocol

from storage.errors import JobError, LeaseLost
from storage.job_record import (
    LAUNCHER_OWNER,
    SETTLED_BY_SUPERVISOR,
    SETTLED_BY_SWEEP,
    SETTLED_BY_USER,
    JobRecord,
    Submission,
    submission_id_for,
)
from storage.job_state import JobKind
from storage.jobs import Jobs, utc_now
from storage.jobs_config import JobsConfig

logger = logging.getLogger(__name__)

PENDING, RUNNING, UNKNOWN = "PENDING", "RUNNING", "UNKNOWN"
ENDED = frozenset({"SUCCEEDED", "FAILED", "STOPPED"})

SUBMIT_DELAY_S_MAX = 60.0
STOP_AGAIN_S = 30.0

_SETTLED_FROM_OUTSIDE = frozenset(
    {LAUNCHER_OWNER, SETTLED_BY_SUPERVISOR, SETTLED_BY_SWEEP, SETTLED_BY_USER},
)


class TrainingLauncher(Protocol):
    """Starts and stops the Ray job of a training.

    It is called from one thread, and each method returns or raises within its own time limit. It is pickled into
    the jobs actor.
    """

    def submit(self, job_id: str, attempt: int) -> str:
        """Start the driver of an attempt. Returns the submission id, which is `submission_id_for(job_id, attempt)`."""
        ...

    def status(self, submission_id: str) -> str:
        """PENDING, RUNNING, SUCCEEDED, FAILED, STOPPED, or UNKNOWN for a submission that the cluster does not have.

        Raises when the cluster cannot be asked.
        """
        ...

    def stop(self, submission_id: str) -> None:
        """Ask a Ray job to stop. It may have ended already."""
        ...


class TrainingQueue:
    """One pass after another of `run_once`. All that matters is in the records, so a new process goes on from there:

    - a claimed training is noted with its submission id first and submitted second; a submission that the cluster
      does not know is submitted again under the same id, as long as this queue holds the lease;
    - a Ray job that ended without a final record costs the training one attempt;
    - a Ray job whose record is final, or has moved on to another attempt, is stopped; the next attempt waits for it.
    """

    def __init__(
        self,
        jobs: Jobs,
        launcher: TrainingLauncher,
        config: JobsConfig,
        *,
        clock: Callable[[], datetime] = utc_now,
    ) -> None:
        self._jobs = jobs
        self._launcher = launcher
        self._config = config
        self._clock = clock
        self._running_since: dict[str, datetime] = {}
        self._stopped_at: dict[str, datetime] = {}
        self._submit_failures: dict[str, int] = {}
        self._submit_again_at: dict[str, datetime] = {}

    def run_once(self) -> None:
        """Claim what fits, then look at every Ray job. Trouble with one of them is logged and stops no other."""
        self._claim()
        submissions = self._jobs.submissions()
        for submission in submissions:
            try:
                self._watch(submission, submissions)
            except LeaseLost:
                logger.info("%s changed hands during this pass", submission.job_id)
            except JobError:
                raise
            except Exception:
                logger.exception("the cluster could not be asked about %s", submission.submission_id)

    def _claim(self) -> None:
        held = self._jobs.leased_by(JobKind.TRAINING, LAUNCHER_OWNER)
        claimed = [record for record in held if record.submission_id != _submission_of(record)]
        free = self._config.training_slots - len(self._jobs.submissions()) - len(claimed)
        if free > 0:
            claimed += self._jobs.claim(JobKind.TRAINING, LAUNCHER_OWNER, limit=free, lease_s=self._config.lease_s)
        for record in claimed:
            self._jobs.attach(record.id, owner=LAUNCHER_OWNER, submission_id=_submission_of(record))

    def _watch(self, submission: Submission, submissions: list[Submission]) -> None:
        record = self._jobs.get(submission.job_id)
        if _is_current(record, submission) and record.lease_owner == LAUNCHER_OWNER:
            if record.cancel_requested:
                record = self._jobs.cancelled(record.id, LAUNCHER_OWNER)
            else:
                self._jobs.heartbeat(record.id, LAUNCHER_OWNER, lease_s=self._config.lease_s)
        status = self._launcher.status(submission.submission_id)
        if status in ENDED:
            self._ended(submission, "The training process ended before the training did.")
        elif status == UNKNOWN:
            self._missing(record, submission, submissions)
        elif not _is_current(record, submission):
            self._dismiss(record, submission)
        elif record.lease_owner == LAUNCHER_OWNER and status == RUNNING:
            self._expect_driver(submission)

    def _ended(self, submission: Submission, message: str) -> None:
        # Read again: the driver may have settled the record between the first look and its end.
        if _is_current(self._jobs.get(submission.job_id), submission):
            self._jobs.interrupt(submission.job_id, submission.submission_id, "training_interrupted", message)
        self._close(submission)

    def _missing(self, record: JobRecord, submission: Submission, submissions: list[Submission]) -> None:
        if not _is_current(record, submission):
            self._close(submission)
        elif record.lease_owner == LAUNCHER_OWNER:
            if not any(other.job_id == record.id and other != submission for other in submissions):
                self._submit(record, submission)
        elif record.lease_expires_at is not None and record.lease_expires_at <= self._clock():
            # Until then its driver sends heartbeats, and is believed more than a cluster that lost the job.
            self._ended(submission, "The cluster lost the training process.")

    def _submit(self, record: JobRecord, submission: Submission) -> None:
        key = submission.submission_id
        again_at = self._submit_again_at.get(key)
        if again_at is not None and self._clock() < again_at:
            return
        try:
            self._launcher.submit(record.id, record.attempt)
        except Exception:
            failures = self._submit_failures[key] = self._submit_failures.get(key, 0) + 1
            logger.exception("submitting %s failed, time %d", key, failures)
            self._submit_again_at[key] = self._clock() + timedelta(seconds=min(2.0**failures, SUBMIT_DELAY_S_MAX))
            if failures >= self._config.submit_attempts_max:
                message = "The training could not be handed to the cluster."
                self._jobs.fail(record.id, LAUNCHER_OWNER, "training_submit_failed", message)

    def _expect_driver(self, submission: Submission) -> None:
        now = self._clock()
        since = self._running_since.setdefault(submission.submission_id, now)
        if now - since >= timedelta(seconds=self._config.driver_start_timeout_s):
            message = "The training process started and did not come to work."
            self._jobs.interrupt(submission.job_id, submission.submission_id, "training_start_timeout", message)

    def _dismiss(self, record: JobRecord, submission: Submission) -> None:
        """Stop a Ray job that has nothing to do any more; a driver that settled its record ends by itself at first."""
        if _settled_by_driver(record, submission) and record.finished_at is not None:
            ends_by = record.finished_at + timedelta(seconds=self._config.exit_grace_s)
            if self._clock() < ends_by:
                return
        stopped_at = self._stopped_at.get(submission.submission_id)
        if stopped_at is None or self._clock() - stopped_at >= timedelta(seconds=STOP_AGAIN_S):
            self._stopped_at[submission.submission_id] = self._clock()
            self._launcher.stop(submission.submission_id)

    def _close(self, submission: Submission) -> None:
        self._jobs.close_submission(submission.submission_id)
        self._running_since.pop(submission.submission_id, None)
        self._stopped_at.pop(submission.submission_id, None)
        self._submit_failures.pop(submission.submission_id, None)
        self._submit_again_at.pop(submission.submission_id, None)


def _submission_of(record: JobRecord) -> str:
    return submission_id_for(record.id, record.attempt)


def _is_current(record: JobRecord, submission: Submission) -> bool:
    return record.state.is_leased and record.submission_id == submission.submission_id


def _settled_by_driver(record: JobRecord, submission: Submission) -> bool:
    return (
        record.state.is_terminal
        and record.submission_id == submission.submission_id
        and record.settled_by not in _SETTLED_FROM_OUTSIDE
    )
