"""The life cycle of jobs over their records. Runs without Ray; `storage.jobs_actor` is the shell around it.

What clients do is here, what the owners of jobs do is in `job_ownership`, and watching over them in `job_supervision`.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta

from storage import job_steps
from storage.errors import (
    IdempotencyConflict,
    IdempotencyInFlight,
    JobNotCancellable,
    JobNotRetryable,
    RecordConflict,
)
from storage.issued_keys import IssuedKeys
from storage.job_changes import JobsPolicy
from storage.job_cursor import cursor_after, read_cursor
from storage.job_ownership import JobOwnership
from storage.job_record import (
    SETTLED_BY_USER,
    Heartbeat,
    JobFailure,
    JobRecord,
    JobsHealth,
    NewJob,
    Page,
)
from storage.job_state import JobKind, JobState
from storage.job_streams import JobStreams, new_webhook_id, visible
from storage.job_supervision import JobSupervision
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
RETRYABLE = frozenset({JobState.FAILED, JobState.TIMED_OUT})


def utc_now() -> datetime:
    return datetime.now(UTC)


def new_job_id(kind: JobKind) -> str:
    return f"{kind.id_prefix}{secrets.token_hex(6)}"


class Jobs(JobOwnership, JobSupervision, JobStreams, KeptReplies, IssuedKeys):
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

    def queued(self, kind: JobKind) -> dict[str, int]:
        """How many jobs of each tenant wait, those that have any. Cheap: it looks at no other jobs."""
        with self._records.read("queued") as tx:
            return tx.queued(kind)

    def retried(self, tenant: str | None = None, *, kind: JobKind | None = None) -> int:
        """How many jobs had more than one attempt."""
        with self._records.read("retried") as tx:
            return tx.retried(tenant=tenant, kind=kind)

    def is_keyed(self, job_id: str) -> bool:
        """Whether the idempotency key that made the job still means it."""
        after = self._clock() - timedelta(seconds=self._policy.idempotency_ttl_s)
        with self._records.read("is_keyed") as tx:
            return tx.has_key(job_id, after)

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

    def health(self) -> JobsHealth:
        with self._records.read("health") as tx:
            return JobsHealth(mirror_pending=tx.outbox_size(), restored=tx.has_flag(RESTORED_FLAG))

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
