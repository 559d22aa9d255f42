"""Job records in SQL: SQLite in WAL mode by default, PostgreSQL by its URL. Only the `records` modules know SQLAlchemy.

`Records` opens transactions; a `RecordsTx` reads and writes rows inside one. The rules of the life cycle are in
`storage.jobs`. Each write of a job also queues it in the outbox of the mirror, in the same transaction.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from storage.errors import RecordConflict
from storage.job_record import JobRecord, Submission
from storage.job_state import LEASED_STATES, TERMINAL_STATES, JobKind, JobState
from storage.key_rows import KeyRows
from storage.records_engine import WRITES, mapped_errors, open_engine
from storage.records_streams import StreamsTx
from storage.records_tables import (
    FIXED,
    NOT_OF_RECORDS,
    OUTBOX_SEQ,
    QUEUED,
    api_key_uses,
    api_keys,
    flags,
    idempotency,
    jobs,
    make_tables,
    outbox,
    replies,
    submissions,
    turns,
)
from storage.reply_rows import ReplyRows

# Made once: to put a query together takes as long as to send it.
_BY_ID = sa.select(jobs).where(jobs.c.id == sa.bindparam("job_id"))
_LOCKED_BY_ID = _BY_ID.with_for_update()
_BY_RUNPOD_ID = sa.select(jobs).where(
    jobs.c.tenant == sa.bindparam("tenant_name"), jobs.c.runpod_id == sa.bindparam("known_as")
)


@dataclass(frozen=True)
class IdempotencyEntry:
    body_sha256: str
    job_id: str
    created_at: datetime


@dataclass(frozen=True)
class OutboxEntry:
    seq: int
    record: JobRecord


class Records:
    """The database of job records. Safe to use from many threads.

    Raises RecordsMisconfigured for a URL that cannot be used, RecordsUnavailable while the database cannot be
    reached or is locked for longer than BUSY_TIMEOUT_S, RecordConflict when a unique value is taken, and RecordsFailed
    for every other error of the database.
    """

    def __init__(self, url: str, *, read_only: bool = False) -> None:
        """`read_only`: of a database that another process keeps. Raises RecordsUnavailable where its file is not."""
        with mapped_errors("open"):
            self._engine = open_engine(url, read_only=read_only)
            self._writer = self._engine.execution_options(**{WRITES: True})
            if not read_only:
                make_tables(self._writer)
        # Databases let one writer in and make the others poll or wait in line; a lock hands over at once.
        self._write_lock = threading.Lock()

    def close(self) -> None:
        self._engine.dispose()

    @property
    def file(self) -> Path | None:
        """Of SQLite."""
        url = self._engine.url
        return Path(url.database) if url.get_backend_name() == "sqlite" and url.database else None

    @contextlib.contextmanager
    def write(self, operation: str) -> Iterator[RecordsTx]:
        """One transaction that takes the write lock at its beginning; committed at the end, undone by any error."""
        with self._write_lock, mapped_errors(operation), self._writer.begin() as connection:
            yield RecordsTx(connection)

    @contextlib.contextmanager
    def read(self, operation: str) -> Iterator[RecordsTx]:
        """One consistent view of the database that waits for no writer."""
        with mapped_errors(operation), self._engine.begin() as connection:
            yield RecordsTx(connection)


class RecordsTx(StreamsTx):
    """Reads and writes of one transaction."""

    def __init__(self, connection: sa.Connection) -> None:
        super().__init__(connection)
        self.replies = ReplyRows(connection, replies)
        self.keys = KeyRows(connection, api_keys, api_key_uses)

    # --- jobs

    def get(self, job_id: str, *, lock: bool = False) -> JobRecord | None:
        """`lock` keeps the row until the end of the transaction, where the database locks rows and not the whole."""
        row = self._connection.execute(_LOCKED_BY_ID if lock else _BY_ID, {"job_id": job_id}).one_or_none()
        return None if row is None else _record(row)

    def by_runpod_id(self, tenant: str, runpod_id: str) -> JobRecord | None:
        parameters = {"tenant_name": tenant, "known_as": runpod_id}
        row = self._connection.execute(_BY_RUNPOD_ID, parameters).one_or_none()
        return None if row is None else _record(row)

    def insert(self, record: JobRecord) -> None:
        self._connection.execute(sa.insert(jobs).values(_row(record)))
        self._queue_mirror(record.id)

    def save(self, record: JobRecord, *, mirror: bool = True) -> None:
        """Write what may change of a job that exists."""
        row = {name: value for name, value in _row(record).items() if name not in FIXED}
        self._connection.execute(sa.update(jobs).where(jobs.c.id == record.id).values(row))
        self._follow_state(record)
        if mirror:
            self._queue_mirror(record.id)

    def insert_missing(self, record: JobRecord) -> bool:
        """Insert a record that came from the mirror, unless one of that id is here. Returns whether it was inserted."""
        if self.get(record.id) is not None:
            return False
        self._connection.execute(sa.insert(jobs).values(_row(record)))
        return True

    def page(
        self,
        tenant: str,
        *,
        kind: JobKind | None,
        states: Sequence[JobState] | None,
        limit: int,
        before: tuple[datetime, int] | None,
    ) -> list[tuple[int, JobRecord]]:
        """Up to `limit` records newest first, each with its row number, from just after the row `before`."""
        query = sa.select(jobs).where(jobs.c.tenant == tenant)
        if kind is not None:
            query = query.where(jobs.c.kind == kind.value)
        if states is not None:
            query = query.where(jobs.c.state.in_([state.value for state in states]))
        if before is not None:
            created_at, seq = before
            query = query.where(
                sa.or_(jobs.c.created_at < created_at, sa.and_(jobs.c.created_at == created_at, jobs.c.seq < seq))
            )
        query = query.order_by(jobs.c.created_at.desc(), jobs.c.seq.desc()).limit(limit)
        return [(row.seq, _record(row)) for row in self._connection.execute(query)]

    def counts(self, *, tenant: str | None, kind: JobKind | None) -> dict[JobState, int]:
        query = sa.select(jobs.c.state, sa.func.count()).group_by(jobs.c.state)
        return {JobState(state): count for state, count in self._connection.execute(_scoped(query, tenant, kind))}

    def queued(self, kind: JobKind) -> dict[str, int]:
        query = sa.select(jobs.c.tenant, sa.func.count()).where(jobs.c.kind == kind.value, jobs.c.state == QUEUED)
        rows = self._connection.execute(query.group_by(jobs.c.tenant))
        return {row[0]: row[1] for row in rows}

    def retried(self, *, tenant: str | None, kind: JobKind | None) -> int:
        query = sa.select(sa.func.count()).select_from(jobs).where(jobs.c.attempt > 1)
        return int(self._connection.execute(_scoped(query, tenant, kind)).scalar_one())

    def queued_of(self, tenant: str, kind: JobKind | None) -> list[JobRecord]:
        query = sa.select(jobs).where(jobs.c.state == JobState.QUEUED.value).with_for_update()
        return self._all(_scoped(query, tenant, kind))

    def leased_by(self, kind: JobKind, owner: str) -> list[JobRecord]:
        """The jobs whose lease `owner` holds, oldest first."""
        states = [state.value for state in LEASED_STATES]
        query = sa.select(jobs).where(jobs.c.kind == kind.value, jobs.c.state.in_(states), jobs.c.lease_owner == owner)
        return self._all(query.order_by(jobs.c.seq))

    def leased(self, kind: JobKind) -> list[JobRecord]:
        """The jobs that anybody works on, oldest first."""
        states = [state.value for state in LEASED_STATES]
        query = sa.select(jobs).where(jobs.c.kind == kind.value, jobs.c.state.in_(states))
        return self._all(query.order_by(jobs.c.seq))

    # --- queue

    def next_queued(self, kind: JobKind, limit: int) -> list[JobRecord]:
        """The queued jobs whose turn it is: by priority, then tenant after tenant, each tenant's own in order."""
        rank = sa.func.row_number().over(
            partition_by=(jobs.c.tenant, jobs.c.priority), order_by=(jobs.c.queued_at, jobs.c.seq)
        )
        queue = (
            sa.select(jobs.c.seq, rank.label("rank"), sa.func.coalesce(turns.c.turn, 0).label("turn"))
            .select_from(
                jobs.outerjoin(turns, sa.and_(turns.c.kind == jobs.c.kind, turns.c.tenant == jobs.c.tenant)),
            )
            .where(jobs.c.kind == kind.value, jobs.c.state == JobState.QUEUED.value)
            .subquery()
        )
        return self._all(
            sa.select(jobs)
            .join(queue, queue.c.seq == jobs.c.seq)
            .order_by(jobs.c.priority.desc(), queue.c.rank, queue.c.turn, jobs.c.queued_at, jobs.c.seq)
            .limit(limit)
        )

    def take_turn(self, kind: JobKind, tenant: str) -> None:
        """Put a tenant that was just served behind the others."""
        last = self._connection.execute(sa.select(sa.func.max(turns.c.turn)).where(turns.c.kind == kind.value)).scalar()
        here = sa.and_(turns.c.kind == kind.value, turns.c.tenant == tenant)
        self._connection.execute(sa.delete(turns).where(here))
        self._connection.execute(sa.insert(turns).values(kind=kind.value, tenant=tenant, turn=(last or 0) + 1))

    def overdue(self, now: datetime, *, cancel_grace_s: float, timeout_grace_s: float, limit: int) -> list[JobRecord]:
        """Jobs that a sweep has to look at: a lease that ran out, a time limit passed, a cancel not answered."""
        answered_by = now - timedelta(seconds=cancel_grace_s)
        ended_by = now - timedelta(seconds=timeout_grace_s)
        leased = jobs.c.state.in_([state.value for state in LEASED_STATES])
        overdue = sa.or_(
            sa.and_(leased, jobs.c.lease_expires_at <= now),
            sa.and_(leased, jobs.c.cancel_requested_at <= answered_by),
            sa.and_(leased, jobs.c.run_deadline_at <= ended_by),
            sa.and_(leased, jobs.c.expires_at <= ended_by),
            sa.and_(jobs.c.state == JobState.QUEUED.value, jobs.c.expires_at <= now),
        )
        open_states = jobs.c.state.not_in([state.value for state in TERMINAL_STATES])
        return self._all(sa.select(jobs).where(open_states, overdue).order_by(jobs.c.seq).limit(limit))

    # --- idempotency keys

    def key(self, tenant: str, key: str) -> IdempotencyEntry | None:
        query = sa.select(idempotency).where(idempotency.c.tenant == tenant, idempotency.c.key == key)
        row = self._connection.execute(query).one_or_none()
        return None if row is None else IdempotencyEntry(row.body_sha256, row.job_id, row.created_at)

    def has_key(self, job_id: str, after: datetime) -> bool:
        query = sa.select(idempotency.c.key).where(idempotency.c.job_id == job_id, idempotency.c.created_at > after)
        return self._connection.execute(query.limit(1)).first() is not None

    def put_key(self, tenant: str, key: str, entry: IdempotencyEntry) -> None:
        self._connection.execute(
            sa.insert(idempotency).values(
                tenant=tenant, key=key, body_sha256=entry.body_sha256, job_id=entry.job_id, created_at=entry.created_at
            )
        )

    def drop_keys(self, before: datetime) -> None:
        self._connection.execute(sa.delete(idempotency).where(idempotency.c.created_at <= before))

    # --- submissions

    def open_submission(self, submission_id: str, job_id: str) -> None:
        """Remember a Ray job until `close_submission`. A submission id belongs to one job for ever."""
        known = self._connection.execute(
            sa.select(submissions.c.job_id).where(submissions.c.submission_id == submission_id)
        ).scalar_one_or_none()
        if known is None:
            self._connection.execute(sa.insert(submissions).values(submission_id=submission_id, job_id=job_id))
        elif known != job_id:
            raise RecordConflict("open_submission")

    def close_submission(self, submission_id: str) -> None:
        self._connection.execute(sa.delete(submissions).where(submissions.c.submission_id == submission_id))

    def submissions(self) -> list[Submission]:
        """In the order in which they were opened."""
        rows = self._connection.execute(sa.select(submissions).order_by(submissions.c.seq))
        return [Submission(submission_id=row.submission_id, job_id=row.job_id) for row in rows]

    # --- outbox of the mirror, and flags

    def outbox(self, limit: int) -> list[OutboxEntry]:
        """What the mirror has yet to hold, those that failed least first, so that one bad record blocks no other."""
        query = (
            sa.select(jobs, outbox.c.seq.label(OUTBOX_SEQ))
            .join(outbox, outbox.c.job_id == jobs.c.id)
            .order_by(outbox.c.failures, outbox.c.seq)
            .limit(limit)
        )
        return [OutboxEntry(row._mapping[OUTBOX_SEQ], _record(row)) for row in self._connection.execute(query)]

    def settle_outbox(self, *, written: Sequence[int], failed: Sequence[int]) -> None:
        """Remove the entries that were written. An entry queued again meanwhile has a new number and stays."""
        self._connection.execute(sa.delete(outbox).where(outbox.c.seq.in_(written)))
        self._connection.execute(
            sa.update(outbox).where(outbox.c.seq.in_(failed)).values(failures=outbox.c.failures + 1)
        )

    def outbox_size(self) -> int:
        return int(self._connection.execute(sa.select(sa.func.count()).select_from(outbox)).scalar_one())

    def has_flag(self, name: str) -> bool:
        return self._connection.execute(sa.select(flags).where(flags.c.name == name)).one_or_none() is not None

    def set_flag(self, name: str) -> None:
        if not self.has_flag(name):
            self._connection.execute(sa.insert(flags).values(name=name))

    def _queue_mirror(self, job_id: str) -> None:
        self._connection.execute(sa.delete(outbox).where(outbox.c.job_id == job_id))
        self._connection.execute(sa.insert(outbox).values(job_id=job_id, failures=0))

    def _one(self, query: sa.Select[Any]) -> JobRecord | None:
        row = self._connection.execute(query).one_or_none()
        return None if row is None else _record(row)

    def _all(self, query: sa.Select[Any]) -> list[JobRecord]:
        return [_record(row) for row in self._connection.execute(query)]


def _scoped(query: sa.Select[Any], tenant: str | None, kind: JobKind | None) -> sa.Select[Any]:
    if tenant is not None:
        query = query.where(jobs.c.tenant == tenant)
    return query if kind is None else query.where(jobs.c.kind == kind.value)


def _record(row: sa.Row[Any]) -> JobRecord:
    fields = row._asdict()
    for name in NOT_OF_RECORDS:
        fields.pop(name, None)
    return JobRecord.model_validate(fields)


def _row(record: JobRecord) -> dict[str, Any]:
    row = record.model_dump()
    row["kind"], row["state"] = record.kind.value, record.state.value
    row["run_deadline_at"] = _after(record.started_at, record.timeout_s)
    row["expires_at"] = _after(record.queued_at, record.ttl_s)
    return row


def _after(start: datetime | None, seconds: float | None) -> datetime | None:
    return None if start is None or seconds is None else start + timedelta(seconds=seconds)
