"""The part of `storage.jobs.Jobs` for whoever works on a job: take its lease, keep it, and settle the job."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from storage import job_steps
from storage.errors import LeaseLost
from storage.job_changes import JobChanges, JobList
from storage.job_record import DEFAULT_LEASE_S, Heartbeat, JobFailure, JobRecord
from storage.job_state import JobKind, JobState
from storage.job_streams import progress_events, visible


class JobOwnership(JobChanges):
    """Like `Jobs`: every method is one transaction and raises RecordsError when the database fails.

    Methods that take an `owner` raise LeaseLost when that owner does not hold the job's lease; repeating the call by
    which it settled the job returns the record again.
    """

    def claim(self, kind: JobKind, owner: str, *, limit: int = 1, lease_s: float = DEFAULT_LEASE_S) -> JobList:
        """Take up to `limit` queued jobs: highest priority first, tenants in turn, each tenant's oldest first."""
        now = self._clock()
        with self._records.write("claim") as tx:
            claimed = [job_steps.lease(record, owner, now, lease_s) for record in tx.next_queued(kind, limit)]
            for record in claimed:
                tx.save(record)
                tx.take_turn(kind, record.tenant)
        self._announce(claimed)
        return claimed

    def adopt(
        self, job_id: str, owner: str, lease_s: float = DEFAULT_LEASE_S, *, submission_id: str | None = None
    ) -> JobRecord:
        """The process that does the work takes the lease: from the training queue, from a queued job, or from an
        owner whose lease ran out. `submission_id` is the Ray job it runs in, if it does.

        Raises LeaseLost when the job has ended, has another owner, or has moved on to another Ray job.
        """
        now = self._clock()

        def step(record: JobRecord) -> JobRecord:
            if not job_steps.may_adopt(record, owner, submission_id, now):
                raise LeaseLost(job_id, owner)
            leased = job_steps.lease(record, owner, now, lease_s)
            if submission_id is None or submission_id == record.submission_id:
                return leased
            return job_steps.submit(leased, now, submission_id)

        return self._change("adopt", job_id, step, submission_id=submission_id)

    def attach(self, job_id: str, *, owner: str, submission_id: str) -> JobRecord:
        """Note the Ray job of the current attempt, before it is submitted, so that it is watched whatever happens."""
        now = self._clock()

        def step(record: JobRecord) -> JobRecord:
            job_steps.check_owner(record, owner)
            if record.submission_id == submission_id:
                return record
            return job_steps.submit(record, now, submission_id)

        return self._change("attach", job_id, step, submission_id=submission_id)

    def start(
        self, job_id: str, owner: str, *, worker_id: str | None = None, lease_s: float = DEFAULT_LEASE_S
    ) -> JobRecord:
        """STARTING to RUNNING. The time limit of the attempt counts from here."""
        now = self._clock()

        def step(record: JobRecord) -> JobRecord:
            job_steps.check_owner(record, owner)
            if record.state is JobState.RUNNING:
                return record
            return job_steps.start(record, now, worker_id, lease_s)

        return self._change("start", job_id, step)

    def heartbeat(
        self,
        job_id: str,
        owner: str,
        *,
        progress: dict[str, Any] | None = None,
        events: Sequence[dict[str, Any]] | None = None,
        lease_s: float = DEFAULT_LEASE_S,
    ) -> Heartbeat:
        """Keep the lease for another `lease_s` and replace the progress if it is given.

        `events` go to the job's stream, for owners that report more often than they send heartbeats; without them a
        progress that differs from the last one is an event.
        """
        now = self._clock()

        with self._records.write("heartbeat") as tx:
            record = visible(tx.get(job_id, lock=True), job_id, None)
            job_steps.check_owner(record, owner)
            renewed = job_steps.lease(record, owner, now, lease_s)
            if progress is not None:
                renewed = job_steps.report(renewed, now, progress)
            # The mirror holds transitions; it would otherwise cost one object write per heartbeat.
            tx.save(renewed, mirror=False)
            if events is None:
                tx.add_events(job_id, now, progress_events(record.progress, renewed.progress))
            else:
                tx.add_events(job_id, now, [job_steps.finite(event) for event in events])
        if progress is not None:
            self._announce([renewed])
        return Heartbeat(cancel_requested=record.cancel_requested, timed_out=job_steps.out_of_time(record, now))

    def complete(
        self, job_id: str, owner: str, output: dict[str, Any], *, events: Sequence[dict[str, Any]] = ()
    ) -> JobRecord:
        """`events`: what was reported since the last heartbeat."""
        return self._settle(job_id, owner, JobState.COMPLETED, output=output, events=events)

    def fail(self, job_id: str, owner: str, error_code: str, message: str, *, retryable: bool = False) -> JobRecord:
        """FAILED; or, when `retryable` and attempts are left, queued for the next one. `message` is for the client."""
        if not retryable:
            return self._settle(job_id, owner, JobState.FAILED, error=JobFailure(code=error_code, message=message))
        now = self._clock()

        def step(record: JobRecord) -> JobRecord:
            job_steps.check_owner(record, owner)
            return job_steps.interrupt(record, now, by=owner, code=error_code, message=message)

        return self._change("fail", job_id, step)

    def hand_back(self, job_id: str, owner: str) -> JobRecord:
        """Queue the job again without counting an attempt, because its owner is told to stop. One that was asked to
        cancel, or is out of time, ends instead."""
        now = self._clock()

        def step(record: JobRecord) -> JobRecord:
            job_steps.check_owner(record, owner)
            return job_steps.hand_back(record, now, by=owner)

        return self._change("hand_back", job_id, step)

    def cancelled(self, job_id: str, owner: str, output: dict[str, Any] | None = None) -> JobRecord:
        """`output` names what was kept, such as the last checkpoint."""
        return self._settle(job_id, owner, JobState.CANCELLED, output=output)

    def timed_out(self, job_id: str, owner: str, output: dict[str, Any] | None = None) -> JobRecord:
        return self._settle(job_id, owner, JobState.TIMED_OUT, output=output)

    def _settle(
        self,
        job_id: str,
        owner: str,
        state: JobState,
        *,
        output: dict[str, Any] | None = None,
        error: JobFailure | None = None,
        events: Sequence[dict[str, Any]] = (),
    ) -> JobRecord:
        now = self._clock()

        def step(record: JobRecord) -> JobRecord:
            if record.state is state and record.settled_by == owner:
                return record
            job_steps.check_owner(record, owner)
            if state is JobState.TIMED_OUT:
                return job_steps.time_out(record, now, by=owner, output=output)
            return job_steps.settle(record, state, now, by=owner, output=output, error=error)

        return self._change(state.value.lower(), job_id, step, events=[job_steps.finite(event) for event in events])
