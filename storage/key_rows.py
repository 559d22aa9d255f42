"""The table of API keys that were made over HTTP."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa


@dataclass(frozen=True)
class IssuedKey:
    """A key, known by `key_sha256` (hex) only.

    A plain SHA-256 is right here, unlike for passwords: a key is 256 random bits, so that no number of guesses finds
    it, and a hash that is slow on purpose would only make every request slow.
    """

    id: str
    tenant: str
    name: str
    key_sha256: str
    created_at: datetime
    revoked_at: datetime | None = None


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


class KeyRows:
    """Reads and writes of one transaction."""

    def __init__(self, connection: sa.Connection, table: sa.Table) -> None:
        self._connection = connection
        self._table = table

    def get(self, key_id: str) -> IssuedKey | None:
        row = self._connection.execute(sa.select(self._table).where(self._table.c.id == key_id)).one_or_none()
        return None if row is None else IssuedKey(**row._mapping)

    def insert(self, key: IssuedKey) -> None:
        self._connection.execute(sa.insert(self._table).values(vars(key)))

    def revoke(self, key_id: str, now: datetime) -> None:
        self._connection.execute(sa.update(self._table).where(self._table.c.id == key_id).values(revoked_at=now))

    def all(self, *, valid_only: bool) -> list[IssuedKey]:
        """Newest first."""
        query = sa.select(self._table).order_by(self._table.c.created_at.desc(), self._table.c.id)
        rows = self._connection.execute(query.where(self._table.c.revoked_at.is_(None)) if valid_only else query)
        return [IssuedKey(**row._mapping) for row in rows]
