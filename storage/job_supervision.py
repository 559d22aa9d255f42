"""The part of `storage.jobs.Jobs` for whoever watches over the owners: what none of them moves any more goes on."""

from __future__ import annotations

from datetime import timedelta
from typing import TypeAlias

from storage import job_steps
from storage.errors import LeaseLost
from storage.job_changes import JobChanges, JobList
from storage.job_record import SETTLED_BY_SUPERVISOR, JobRecord, Submission
from storage.job_state import JobKind

SWEEP_MAX = 500

SubmissionList: TypeAlias = list[Submission]


class JobSupervision(JobChanges):
    """Like `Jobs`: every method is one transaction and raises RecordsError when the database fails."""

    def leased(self, kind: JobKind) -> JobList:
        """The jobs that anybody works on, oldest first."""
        with self._records.read("leased") as tx:
            return tx.leased(kind)

    def allow_attempts(self, job_id: str, attempts_max: int) -> JobRecord:
        """Let the job have at least so many attempts in all. Repeated, it changes nothing more."""
        now = self._clock()
        return self._change(
            "allow_attempts", job_id, lambda record: job_steps.allow_attempts(record, now, attempts_max)
        )

    def reap(self) -> JobList:
        """Settle or requeue what nobody moves any more, and forget old keys and events. Returns what changed."""
        now = self._clock()
        grace = {"cancel_grace_s": self._policy.cancel_grace_s, "timeout_grace_s": self._policy.timeout_grace_s}
        with self._records.write("reap") as tx:
            tx.drop_keys(now - timedelta(seconds=self._policy.idempotency_ttl_s))
            tx.drop_streams(now - timedelta(seconds=self._policy.events_kept_s))
            overdue = tx.overdue(now, **grace, limit=SWEEP_MAX)
            swept = [job_steps.sweep(record, now, **grace) for record in overdue]
            for record in swept:
                tx.save(record)
        self._announce(swept)
        return swept

    def interrupt(self, job_id: str, submission_id: str, error_code: str, message: str) -> JobRecord:
        """The Ray job of the current attempt ended, or never came to work: queue the job again or give it up.

        Raises LeaseLost when the job has ended or has moved on to another Ray job.
        """
        now = self._clock()

        def step(record: JobRecord) -> JobRecord:
            if not record.state.is_leased or record.submission_id != submission_id:
                raise LeaseLost(job_id, submission_id)
            return job_steps.interrupt(record, now, by=SETTLED_BY_SUPERVISOR, code=error_code, message=message)

        return self._change("interrupt", job_id, step)

    def submissions(self) -> SubmissionList:
        """The Ray jobs that are not known to have ended."""
        with self._records.read("submissions") as tx:
            return tx.submissions()

    def close_submission(self, submission_id: str) -> None:
        with self._records.write("close_submission") as tx:
            tx.close_submission(submission_id)

    def leased_by(self, kind: JobKind, owner: str) -> JobList:
        with self._records.read("leased_by") as tx:
            return tx.leased_by(kind, owner)
