"""Rows that go with a job: its events, how far they were read, and the webhooks that tell of its end."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from storage.job_record import JobEvent, JobRecord
from storage.job_state import JobState
from storage.records_tables import drains, events, webhooks
from storage.webhook_record import Webhook

EVENTS_MAX = 1000
PRUNE_EVERY = 64


class StreamsTx:
    """Reads and writes of one transaction."""

    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection

    # --- events

    def add_events(self, job_id: str, now: datetime, data: Sequence[dict[str, Any]]) -> None:
        """The oldest beyond EVENTS_MAX are dropped, now and then."""
        if not data:
            return
        rows = [{"job_id": job_id, "at": now, "data": item} for item in data]
        self._connection.execute(sa.insert(events), rows)
        newest = self._connection.execute(
            sa.select(sa.func.max(events.c.seq)).where(events.c.job_id == job_id)
        ).scalar()
        if newest is not None and newest % PRUNE_EVERY < len(rows):
            self._prune(job_id)

    def events_after(self, job_id: str, seq: int, limit: int) -> list[JobEvent]:
        """In the order in which they were reported."""
        query = sa.select(events).where(events.c.job_id == job_id, events.c.seq > seq).order_by(events.c.seq)
        rows = self._connection.execute(query.limit(limit))
        return [JobEvent(seq=row.seq, at=row.at, data=row.data) for row in rows]

    def drained(self, job_id: str) -> tuple[int, bool]:
        """The last event that was given out, and whether the end was too."""
        row = self._connection.execute(sa.select(drains).where(drains.c.job_id == job_id)).one_or_none()
        return (0, False) if row is None else (row.seq, row.ended)

    def set_drained(self, job_id: str, seq: int, *, ended: bool, now: datetime) -> None:
        self._connection.execute(sa.delete(drains).where(drains.c.job_id == job_id))
        self._connection.execute(sa.insert(drains).values(job_id=job_id, seq=seq, ended=ended, at=now))

    def drop_streams(self, before: datetime) -> None:
        """Forget events, places and delivered webhooks from before a time."""
        self._connection.execute(sa.delete(events).where(events.c.at <= before))
        self._connection.execute(sa.delete(drains).where(drains.c.at <= before))
        self._connection.execute(sa.delete(webhooks).where(webhooks.c.done_at <= before))

    # --- webhooks

    def add_webhook(self, webhook: Webhook) -> None:
        self._connection.execute(sa.insert(webhooks).values(webhook.model_dump()))

    def tenants_of_due_webhooks(self, now: datetime) -> list[str]:
        """One look into the index for each, however many are due of one."""
        first = sa.select(sa.func.min(webhooks.c.tenant)).where(webhooks.c.due_at <= now)
        found: list[str] = []
        tenant = self._connection.execute(first).scalar()
        while tenant is not None:
            found.append(tenant)
            tenant = self._connection.execute(first.where(webhooks.c.tenant > tenant)).scalar()
        return found

    def due_webhooks(self, tenant: str, now: datetime, limit: int) -> list[Webhook]:
        """Those that waited longest first, no two readers the same where the database locks rows."""
        query = sa.select(webhooks).where(webhooks.c.tenant == tenant, webhooks.c.due_at <= now)
        query = query.order_by(webhooks.c.due_at).limit(limit)
        rows = self._connection.execute(query.with_for_update(skip_locked=True))
        return [Webhook.model_validate(dict(row._mapping)) for row in rows]

    def webhook(self, webhook_id: str) -> Webhook | None:
        row = self._connection.execute(sa.select(webhooks).where(webhooks.c.id == webhook_id)).one_or_none()
        return None if row is None else Webhook.model_validate(dict(row._mapping))

    def save_webhook(self, webhook: Webhook) -> None:
        row = webhook.model_dump(include={"round", "attempts", "due_at", "done_at"})
        self._connection.execute(sa.update(webhooks).where(webhooks.c.id == webhook.id).values(row))

    def _follow_state(self, record: JobRecord) -> None:
        """A final state makes the job's webhook due; a retry makes it wait for the next one, and streams anew."""
        mine = webhooks.c.job_id == record.id
        if record.state.is_terminal:
            waiting = sa.and_(mine, webhooks.c.due_at.is_(None), webhooks.c.done_at.is_(None))
            self._connection.execute(sa.update(webhooks).where(waiting).values(due_at=record.finished_at))
        elif record.state is JobState.QUEUED:
            told = sa.and_(mine, sa.or_(webhooks.c.due_at.is_not(None), webhooks.c.done_at.is_not(None)))
            again = {"due_at": None, "done_at": None, "attempts": 0, "round": webhooks.c.round + 1}
            self._connection.execute(sa.update(webhooks).where(told).values(again))
            self._connection.execute(sa.update(drains).where(drains.c.job_id == record.id).values(ended=False))

    def _prune(self, job_id: str) -> None:
        kept = sa.select(events.c.seq).where(events.c.job_id == job_id).order_by(events.c.seq.desc())
        oldest_kept = self._connection.execute(kept.offset(EVENTS_MAX - 1).limit(1)).scalar_one_or_none()
        if oldest_kept is not None:
            gone = sa.and_(events.c.job_id == job_id, events.c.seq < oldest_kept)
            self._connection.execute(sa.delete(events).where(gone))
