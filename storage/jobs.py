"""The life cycle of jobs over their records. Runs without Ray; `storage.jobs_actor` is the shell around it."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, TypeAlias

from storage import job_steps
from storage.errors import (
    IdempotencyConflict,
    IdempotencyInFlight,
    JobNotCancellable,
    JobNotRetryable,
    LeaseLost,
    RecordConflict,
)
from storage.issued_keys import IssuedKeys
from storage.job_cursor import cursor_after, read_cursor
from storage.job_record import (
    DEFAULT_LEASE_S,
    SETTLED_BY_SUPERVISOR,
    SETTLED_BY_USER,
    Heartbeat,
    JobFailure,
    JobRecord,
    JobsHealth,
    NewJob,
    Page,
    Submission,
)
from storage.job_state import JobKind, JobState
from storage.job_streams import JobStreams, new_webhook_id, progress_events, visible
from storage.kept_replies import KeptReplies
from storage.records import IdempotencyEntry, Records, RecordsTx
from storage.webhook_record import Webhook

__all__ = [
    "Heartbeat",
    "JobFailure",
    "JobKind",
    "JobRecord",
    "JobState",
    "Jobs",
    "JobsHealth",
    "JobsPolicy",
    "NewJob",
    "Page",
    "new_job_id",
]

RESTORED_FLAG = "restored"
PAGE_MAX = 1000
SWEEP_MAX = 500
RETRYABLE = frozenset({JobState.FAILED, JobState.TIMED_OUT})

JobList: TypeAlias = list[JobRecord]
SubmissionList: TypeAlias = list[Submission]
Step: TypeAlias = Callable[[JobRecord], JobRecord]


@dataclass(frozen=True)
class JobsPolicy:
    """`cancel_grace_s` and `timeout_grace_s` are what an owner gets to save its work and settle the job itself."""

    cancel_grace_s: float = 120.0
    timeout_grace_s: float = 60.0
    idempotency_ttl_s: float = 24 * 3600.0
    events_kept_s: float = 24 * 3600.0


def utc_now() -> datetime:
    return datetime.now(UTC)


def new_job_id(kind: JobKind) -> str:
    return f"{kind.id_prefix}{secrets.token_hex(6)}"


class Jobs(JobStreams, KeptReplies, IssuedKeys):
    """Every method is one transaction: it happens as a whole or not at all, and is safe to call from many threads.

    All methods raise RecordsError when the database fails. Methods that take an `owner` raise LeaseLost when that
    owner does not hold the job's lease; repeating the call by which it settled the job returns the record again.
    Methods that take a `tenant` raise JobNotFound for a job of another one.
    """

    def __init__(
        self,
        records: Records,
        *,
        policy: JobsPolicy | None = None,
        clock: Callable[[], datetime] = utc_now,
        on_change: Callable[[JobRecord], None] | None = None,
    ) -> None:
        """`on_change` gets each record after its change was committed, on the thread that made it."""
        self._records = records
        self._policy = policy or JobsPolicy()
        self._clock = clock
        self.on_change = on_change

    # --- clients

    def create(self, job: NewJob) -> JobRecord:
        """The new record, or the one that the same id, or the same idempotency key and body, made before.

        Raises IdempotencyConflict for a key that came with another body, IdempotencyInFlight when another creation
        with the key is under way and its end could not be seen, RecordConflict for a runpod_id that is taken.
        """
        try:
            return self._create(job)
        except RecordConflict:
            # Another process inserted the same id or key between our look and our insert. It is visible now.
            try:
                return self._create(job)
            except RecordConflict as error:
                if job.idempotency_key is None:
                    raise
                raise IdempotencyInFlight(job.idempotency_key) from error

    def get(self, job_id: str, *, tenant: str | None = None) -> JobRecord:
        with self._records.read("get") as tx:
            return visible(tx.get(job_id), job_id, tenant)

    def get_by_runpod_id(self, runpod_id: str, *, tenant: str) -> JobRecord:
        with self._records.read("get_by_runpod_id") as tx:
            return visible(tx.by_runpod_id(tenant, runpod_id), runpod_id, tenant)

    def list(
        self,
        tenant: str,
        *,
        kind: JobKind | None = None,
        states: Sequence[JobState] | None = None,
        limit: int = 50,
        cursor: str | None = None,
    ) -> Page:
        """A page of a tenant's records, newest first. At most PAGE_MAX of them. Raises InvalidCursor."""
        limit = max(1, min(limit, PAGE_MAX))
        before = None if cursor is None else read_cursor(cursor)
        with self._records.read("list") as tx:
            rows = tx.page(tenant, kind=kind, states=states, limit=limit + 1, before=before)
        shown = rows[:limit]
        next_cursor = cursor_after(shown[-1][1].created_at, shown[-1][0]) if len(rows) > limit else None
        return Page(records=tuple(record for _, record in shown), next_cursor=next_cursor)

    def counts(self, tenant: str | None = None, *, kind: JobKind | None = None) -> dict[JobState, int]:
        """How many jobs are in each state, all states included."""
        with self._records.read("counts") as tx:
            return dict.fromkeys(JobState, 0) | tx.counts(tenant=tenant, kind=kind)

    def retried(self, tenant: str | None = None, *, kind: JobKind | None = None) -> int:
        """How many jobs had more than one attempt."""
        with self._records.read("retried") as tx:
            return tx.retried(tenant=tenant, kind=kind)

    def request_cancel(self, job_id: str, *, tenant: str | None) -> JobRecord:
        """CANCELLED at once while queued; later its owner is asked. Asking again changes nothing.

        Raises JobNotCancellable for a job that ended in another way.
        """
        now = self._clock()

        def step(record: JobRecord) -> JobRecord:
            visible(record, job_id, tenant)
            if record.state is JobState.CANCELLED or (record.cancel_requested and not record.state.is_terminal):
                return record
            if record.state.is_terminal:
                raise JobNotCancellable(job_id, record.state.value)
            if record.state is JobState.QUEUED:
                return job_steps.settle(record, JobState.CANCELLED, now, by=SETTLED_BY_USER)
            return job_steps.ask_to_cancel(record, now)

        return self._change("request_cancel", job_id, step)

    def retry(self, job_id: str, *, tenant: str | None) -> JobRecord:
        """Queue a FAILED or TIMED_OUT job again, with one more attempt. Raises JobNotRetryable for any other."""
        now = self._clock()

        def step(record: JobRecord) -> JobRecord:
            visible(record, job_id, tenant)
            if record.state not in RETRYABLE:
                raise JobNotRetryable(job_id, record.state.value)
            return job_steps.queue_again(record, now)

        return self._change("retry", job_id, step)

    def drop_outputs(self, job_id: str, names: Sequence[str], *, tenant: str | None) -> JobRecord:
        """Empty the lists `names` of an ended job's output, whose files are deleted next. Its state stays.

        Raises IllegalTransition for a job that has not ended.
        """
        now = self._clock()

        def step(record: JobRecord) -> JobRecord:
            visible(record, job_id, tenant)
            return job_steps.drop_outputs(record, names, now)

        return self._change("drop_outputs", job_id, step)

    def purge_queue(self, tenant: str, *, kind: JobKind | None = None) -> int:
        """Cancel everything of a tenant that is still queued. Returns how many jobs that were."""
        now = self._clock()
        with self._records.write("purge_queue") as tx:
            purged = [
                job_steps.settle(record, JobState.CANCELLED, now, by=SETTLED_BY_USER)
                for record in tx.queued_of(tenant, kind)
            ]
            for record in purged:
                tx.save(record)
        self._announce(purged)
        return len(purged)

    # --- owners

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

    # --- supervision

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

    def health(self) -> JobsHealth:
        with self._records.read("health") as tx:
            return JobsHealth(mirror_pending=tx.outbox_size(), restored=tx.has_flag(RESTORED_FLAG))

    # --- inside

    def _create(self, job: NewJob) -> JobRecord:
        now = self._clock()
        record = job_steps.create(job, job.job_id or new_job_id(job.kind), now)
        with self._records.write("create") as tx:
            known = self._known(tx, job, now)
            if known is not None:
                return known
            tx.insert(record)
            if job.idempotency_key is not None and job.body_sha256 is not None:
                tx.put_key(job.tenant, job.idempotency_key, IdempotencyEntry(job.body_sha256, record.id, now))
            if job.submission_id is not None:
                tx.open_submission(job.submission_id, record.id)
            if job.webhook is not None:
                asked = job.webhook
                webhook = Webhook(
                    id=new_webhook_id(), job_id=record.id, tenant=job.tenant, url=asked.url, input=asked.input
                )
                tx.add_webhook(webhook)
        self._announce([record])
        return record

    def _known(self, tx: RecordsTx, job: NewJob, now: datetime) -> JobRecord | None:
        if job.job_id is not None and (record := tx.get(job.job_id)) is not None:
            return visible(record, job.job_id, job.tenant)
        if job.idempotency_key is None:
            return None
        tx.drop_keys(now - timedelta(seconds=self._policy.idempotency_ttl_s))
        entry = tx.key(job.tenant, job.idempotency_key)
        if entry is None:
            return None
        if entry.body_sha256 != job.body_sha256:
            raise IdempotencyConflict(job.idempotency_key)
        return visible(tx.get(entry.job_id), entry.job_id, job.tenant)

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

    def _change(
        self,
        operation: str,
        job_id: str,
        step: Step,
        *,
        submission_id: str | None = None,
        events: Sequence[dict[str, Any]] = (),
    ) -> JobRecord:
        with self._records.write(operation) as tx:
            before = visible(tx.get(job_id, lock=True), job_id, None)
            after = step(before)
            if after is not before:
                tx.save(after)
                tx.add_events(job_id, after.updated_at, events)
            if submission_id is not None:
                tx.open_submission(submission_id, job_id)
        if after is not before:
            self._announce([after])
        return after

    def _announce(self, records: Sequence[JobRecord]) -> None:
        if self.on_change is not None:
            for record in records:
                self.on_change(record)
