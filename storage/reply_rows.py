"""The table of replies kept for idempotency keys that name a whole request, not the job that it made."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa


@dataclass(frozen=True)
class ReplyRow:
    """`status` None: the first request is still at work, and may be taken for dead at `expires_at`."""

    fingerprint: str
    status: int | None
    body: str | None
    expires_at: datetime


def replies_table(metadata: sa.MetaData, time: sa.types.TypeEngine[datetime]) -> sa.Table:
    return sa.Table(
        "replies",
        metadata,
        sa.Column("tenant", sa.String(255), primary_key=True),
        sa.Column("key", sa.String(255), primary_key=True),
        sa.Column("fingerprint", sa.String(64), nullable=False),
        sa.Column("status", sa.Integer),
        sa.Column("body", sa.Text),
        sa.Column("expires_at", time, nullable=False, index=True),
    )


class ReplyRows:
    """Reads and writes of one transaction."""

    def __init__(self, connection: sa.Connection, table: sa.Table) -> None:
        self._connection = connection
        self._table = table

    def get(self, tenant: str, key: str) -> ReplyRow | None:
        row = self._connection.execute(sa.select(self._table).where(self._is(tenant, key))).one_or_none()
        return None if row is None else ReplyRow(row.fingerprint, row.status, row.body, row.expires_at)

    def put(self, tenant: str, key: str, row: ReplyRow) -> None:
        """In place of what is there."""
        self.drop(tenant, key)
        values = {"status": row.status, "body": row.body, "expires_at": row.expires_at}
        self._connection.execute(
            sa.insert(self._table).values(tenant=tenant, key=key, fingerprint=row.fingerprint, **values)
        )

    def beginning_with(self, prefix: str, now: datetime) -> list[tuple[str, str, ReplyRow]]:
        """Tenant, key and row of those that have not expired."""
        table = self._table
        query = sa.select(table).where(table.c.key.startswith(prefix, autoescape=True), table.c.expires_at > now)
        return [
            (row.tenant, row.key, ReplyRow(row.fingerprint, row.status, row.body, row.expires_at))
            for row in self._connection.execute(query)
        ]

    def drop(self, tenant: str, key: str) -> None:
        self._connection.execute(sa.delete(self._table).where(self._is(tenant, key)))

    def drop_expired(self, now: datetime) -> None:
        self._connection.execute(sa.delete(self._table).where(self._table.c.expires_at <= now))

    def _is(self, tenant: str, key: str) -> Any:
        return sa.and_(self._table.c.tenant == tenant, self._table.c.key == key)
