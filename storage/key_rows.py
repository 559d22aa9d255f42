"""The table of API keys that were made over HTTP."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa


@dataclass(frozen=True)
class IssuedKey:
    """A key, known by `key_sha256` (hex) only. `last_used_at` is some minutes behind, None where it was never used.

    A plain SHA-256 is right here, unlike for passwords: a key is 256 random bits, so that no number of guesses finds
    it, and a hash that is slow on purpose would only make every request slow.
    """

    id: str
    tenant: str
    name: str
    key_sha256: str
    created_at: datetime
    revoked_at: datetime | None = None
    last_used_at: datetime | None = None


def keys_table(metadata: sa.MetaData, time: sa.types.TypeEngine[datetime]) -> sa.Table:
    return sa.Table(
        "api_keys",
        metadata,
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("tenant", sa.String(255), nullable=False),
        sa.Column("name", sa.String(255), nullable=False),
        sa.Column("key_sha256", sa.String(64), nullable=False, unique=True),
        sa.Column("created_at", time, nullable=False),
        sa.Column("revoked_at", time),
    )


def key_uses_table(metadata: sa.MetaData, time: sa.types.TypeEngine[datetime]) -> sa.Table:
    """A table of its own, which databases made before it get by themselves."""
    return sa.Table(
        "api_key_uses",
        metadata,
        sa.Column("key_id", sa.ForeignKey("api_keys.id"), primary_key=True),
        sa.Column("last_used_at", time, nullable=False),
    )


class KeyRows:
    """Reads and writes of one transaction."""

    def __init__(self, connection: sa.Connection, table: sa.Table, uses: sa.Table) -> None:
        self._connection = connection
        self._table = table
        self._uses = uses

    def get(self, key_id: str) -> IssuedKey | None:
        row = self._connection.execute(self._select().where(self._table.c.id == key_id)).one_or_none()
        return None if row is None else IssuedKey(**row._mapping)

    def insert(self, key: IssuedKey) -> None:
        row = {name: value for name, value in vars(key).items() if name != "last_used_at"}
        self._connection.execute(sa.insert(self._table).values(row))

    def note_use(self, key_id: str, at: datetime) -> None:
        """Nothing where there is no such key, or a later use is known."""
        if self.get(key_id) is None:
            return
        known = self._connection.execute(
            sa.select(self._uses.c.last_used_at).where(self._uses.c.key_id == key_id)
        ).scalar_one_or_none()
        if known is None:
            self._connection.execute(sa.insert(self._uses).values(key_id=key_id, last_used_at=at))
        elif known < at:
            self._connection.execute(sa.update(self._uses).where(self._uses.c.key_id == key_id).values(last_used_at=at))

    def revoke(self, key_id: str, now: datetime) -> None:
        self._connection.execute(sa.update(self._table).where(self._table.c.id == key_id).values(revoked_at=now))

    def all(self, *, valid_only: bool) -> list[IssuedKey]:
        """Newest first."""
        query = self._select().order_by(self._table.c.created_at.desc(), self._table.c.id)
        rows = self._connection.execute(query.where(self._table.c.revoked_at.is_(None)) if valid_only else query)
        return [IssuedKey(**row._mapping) for row in rows]

    def _select(self) -> sa.Select[Any]:
        joined = self._table.outerjoin(self._uses, self._uses.c.key_id == self._table.c.id)
        return sa.select(self._table, self._uses.c.last_used_at).select_from(joined)
