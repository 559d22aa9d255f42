"""The tables of the job records, and nothing that reads or writes them."""

from __future__ import annotations

from datetime import UTC, datetime

import sqlalchemy as sa

from storage.job_state import JobState
from storage.key_rows import key_uses_table, keys_table
from storage.reply_rows import replies_table


class UtcDateTime(sa.TypeDecorator[datetime]):
    """Aware datetimes, stored in UTC and aware again when read, also on SQLite, which keeps no time zone."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


metadata = sa.MetaData()
json_column = sa.JSON(none_as_null=True)

jobs = sa.Table(
    "jobs",
    metadata,
    sa.Column("seq", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("id", sa.String(32), nullable=False, unique=True),
    sa.Column("tenant", sa.String(255), nullable=False),
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("request", json_column, nullable=False),
    sa.Column("source", sa.String(16), nullable=False),
    sa.Column("runpod_id", sa.String(255)),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.Column("queued_at", UtcDateTime, nullable=False),
    sa.Column("updated_at", UtcDateTime, nullable=False),
    sa.Column("started_at", UtcDateTime),
    sa.Column("finished_at", UtcDateTime),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("attempts_max", sa.Integer, nullable=False),
    sa.Column("lease_owner", sa.String(255)),
    sa.Column("lease_expires_at", UtcDateTime),
    sa.Column("cancel_requested", sa.Boolean, nullable=False),
    sa.Column("cancel_requested_at", UtcDateTime),
    sa.Column("progress", json_column, nullable=False),
    sa.Column("output", json_column),
    sa.Column("error", json_column),
    sa.Column("settled_by", sa.String(255)),
    sa.Column("submission_id", sa.String(255)),
    sa.Column("worker_id", sa.String(255)),
    sa.Column("timeout_s", sa.Float, nullable=False),
    sa.Column("ttl_s", sa.Float),
    sa.Column("priority", sa.Integer, nullable=False),
    # Derived from the record at each write, so that a sweep is one indexed comparison.
    sa.Column("run_deadline_at", UtcDateTime),
    sa.Column("expires_at", UtcDateTime),
    sa.Column("notes", json_column),
    sa.UniqueConstraint("tenant", "runpod_id"),
    sa.Index("jobs_by_queue", "kind", "state", "priority", "queued_at"),
    sa.Index("jobs_by_tenant", "tenant", "created_at", "seq"),
    sqlite_autoincrement=True,
)
# As text in the statement: SQLite uses an index of some rows only where it sees that no other ones are asked for.
QUEUED = sa.bindparam(None, JobState.QUEUED.value, type_=sa.String(), literal_execute=True)
sa.Index(
    "jobs_queued",
    jobs.c.kind,
    jobs.c.tenant,
    jobs.c.state,
    sqlite_where=jobs.c.state == JobState.QUEUED.value,
    postgresql_where=jobs.c.state == JobState.QUEUED.value,
)
OUTBOX_SEQ = "outbox_seq"
NOT_OF_RECORDS = ("seq", "run_deadline_at", "expires_at", OUTBOX_SEQ)
"""Columns of a row that is read as a record, and no fields of that."""
FIXED = ("id", "tenant", "kind", "request", "notes", "source", "runpod_id", "created_at")

idempotency = sa.Table(
    "idempotency",
    metadata,
    sa.Column("tenant", sa.String(255), primary_key=True),
    sa.Column("key", sa.String(255), primary_key=True),
    sa.Column("body_sha256", sa.String(64), nullable=False),
    sa.Column("job_id", sa.ForeignKey("jobs.id"), nullable=False),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.Index("idempotency_by_job", "job_id"),
)

turns = sa.Table(
    "turns",
    metadata,
    sa.Column("kind", sa.String(16), primary_key=True),
    sa.Column("tenant", sa.String(255), primary_key=True),
    sa.Column("turn", sa.Integer, nullable=False),
)

submissions = sa.Table(
    "submissions",
    metadata,
    sa.Column("seq", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("submission_id", sa.String(255), nullable=False, unique=True),
    sa.Column("job_id", sa.ForeignKey("jobs.id"), nullable=False, index=True),
)

outbox = sa.Table(
    "outbox",
    metadata,
    # AUTOINCREMENT: a number that is never given twice tells a newer entry of the same job from the one just written.
    sa.Column("seq", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("job_id", sa.ForeignKey("jobs.id"), nullable=False, unique=True),
    sa.Column("failures", sa.Integer, nullable=False, default=0),
    sqlite_autoincrement=True,
)

replies = replies_table(metadata, UtcDateTime())
api_keys = keys_table(metadata, UtcDateTime())
api_key_uses = key_uses_table(metadata, UtcDateTime())

flags = sa.Table("flags", metadata, sa.Column("name", sa.String(64), primary_key=True))

events = sa.Table(
    "events",
    metadata,
    # AUTOINCREMENT: a number is a place in the stream, and is never given twice.
    sa.Column("seq", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("job_id", sa.ForeignKey("jobs.id"), nullable=False),
    sa.Column("at", UtcDateTime, nullable=False, index=True),
    sa.Column("data", json_column, nullable=False),
    sa.Index("events_by_job", "job_id", "seq"),
    sqlite_autoincrement=True,
)

drains = sa.Table(
    "drains",
    metadata,
    sa.Column("job_id", sa.ForeignKey("jobs.id"), primary_key=True),
    sa.Column("seq", sa.Integer, nullable=False),
    sa.Column("ended", sa.Boolean, nullable=False),
    sa.Column("at", UtcDateTime, nullable=False, index=True),
)

webhooks = sa.Table(
    "webhooks",
    metadata,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("job_id", sa.ForeignKey("jobs.id"), index=True),
    sa.Column("tenant", sa.String(255), nullable=False),
    sa.Column("url", sa.Text, nullable=False),
    sa.Column("input", json_column, nullable=False),
    sa.Column("body", json_column),
    sa.Column("round", sa.Integer, nullable=False),
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.Column("due_at", UtcDateTime),
    sa.Column("done_at", UtcDateTime, index=True),
)
# Without those that are told or wait for their job's end: most are.
sa.Index(
    "webhooks_due",
    webhooks.c.tenant,
    webhooks.c.due_at,
    sqlite_where=webhooks.c.due_at.is_not(None),
    postgresql_where=webhooks.c.due_at.is_not(None),
)


def make_tables(engine: sa.Engine) -> None:
    """All tables, and what has been added to them since an existing database was made: indexes, and columns of `jobs`,
    which can be null."""
    metadata.create_all(engine)
    with engine.begin() as connection:
        for table in metadata.tables.values():
            for index in table.indexes:
                index.create(connection, checkfirst=True)
        present = {column["name"] for column in sa.inspect(connection).get_columns(jobs.name)}
        for column in jobs.columns:
            if column.name not in present:
                kind = column.type.compile(engine.dialect)
                connection.exec_driver_sql(f"ALTER TABLE {jobs.name} ADD COLUMN {column.name} {kind}")
