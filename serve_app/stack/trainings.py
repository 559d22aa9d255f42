"""What happens to trainings that run when their instance is told to stop: they go on at its next start."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from storage.blocking_jobs import BlockingJobs
from storage.job_state import JobKind
from storage.jobs_client import JobsClient
from storage.training_queue import ENDED, UNKNOWN, TrainingLauncher

logger = logging.getLogger(__name__)

EXCUSE_WITHIN_S = 5.0
POLL_S = 0.5


def excuse() -> list[str]:
    """Count none of the attempts that the stop cuts short. Returns the submission ids of their Ray jobs."""
    jobs = BlockingJobs(JobsClient(unavailable_after_s=EXCUSE_WITHIN_S))
    submissions = []
    try:
        for record in jobs.leased(JobKind.TRAINING):
            jobs.allow_attempts(record.id, record.attempts_max + 1)
            logger.info("%s is stopped in attempt %d, which is not counted", record.id, record.attempt)
            if record.submission_id is not None:
                submissions.append(record.submission_id)
    finally:
        jobs.close()
    return submissions


def end(
    submissions: list[str],
    launcher: TrainingLauncher,
    *,
    timeout_s: float,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Stop Ray jobs in a cluster that stays, and wait for their end.

    To be called when the jobs actor has ended: a driver that is told to stop would have it note that somebody cancelled
    the training. What is still running at the end of the time is logged.
    """
    left = [submission for submission in submissions if _asked(launcher, submission)]
    until = clock() + timeout_s
    while left and clock() < until:
        sleep(POLL_S)
        left = [submission for submission in left if not _has_ended(launcher, submission)]
    if left:
        logger.warning("the trainings %s were told to end and are still there", ", ".join(left))


def _asked(launcher: TrainingLauncher, submission: str) -> bool:
    try:
        launcher.stop(submission)
    except Exception:
        # Whatever the cluster's answer was, the others are to be stopped too.
        logger.exception("the training %s could not be stopped", submission)
        return False
    return True


def _has_ended(launcher: TrainingLauncher, submission: str) -> bool:
    try:
        return launcher.status(submission) in {*ENDED, UNKNOWN}
    except Exception:
        logger.exception("the cluster does not say whether the training %s has ended", submission)
        return False
