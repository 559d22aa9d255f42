"""Replies to requests that came with an idempotency key: kept with the job records, so that they outlive a restart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from storage.errors import IdempotencyConflict, IdempotencyInFlight
from storage.records import Records
from storage.reply_rows import ReplyRow

NOTED = 0
"""In the place of an HTTP status."""


@dataclass(frozen=True)
class KeptReply:
    """The first answer: an HTTP status and its body."""

    status: int
    body: str


@dataclass(frozen=True)
class NotedReply:
    """What somebody noted under a name of its own, until `expires_at`. `body` None: nothing any more."""

    tenant: str
    name: str
    body: str | None
    expires_at: datetime


class KeptReplies:
    """Part of `Jobs`. Each method is one transaction; all raise RecordsError when the database fails."""

    _records: Records
    _clock: Callable[[], datetime]

    def open_reply(self, tenant: str, key: str, fingerprint: str, *, hold_s: float) -> KeptReply | None:
        """The reply that the same request got before; None where this is the first, which then answers within
        `hold_s` by `keep_reply` or `drop_reply`.

        Raises IdempotencyConflict where the key came with another request, IdempotencyInFlight while the first one
        is at work.
        """
        now = self._clock()
        with self._records.write("open_reply") as tx:
            tx.replies.drop_expired(now)
            known = tx.replies.get(tenant, key)
            if known is None:
                expires_at = now + timedelta(seconds=hold_s)
                tx.replies.put(tenant, key, ReplyRow(fingerprint, None, None, expires_at))
                return None
        if known.fingerprint != fingerprint:
            raise IdempotencyConflict(key)
        if known.status is None or known.body is None:
            raise IdempotencyInFlight(key)
        return KeptReply(known.status, known.body)

    def keep_reply(self, tenant: str, key: str, fingerprint: str, reply: KeptReply, *, kept_s: float) -> None:
        expires_at = self._clock() + timedelta(seconds=kept_s)
        with self._records.write("keep_reply") as tx:
            tx.replies.put(tenant, key, ReplyRow(fingerprint, reply.status, reply.body, expires_at))

    def drop_reply(self, tenant: str, key: str) -> None:
        """The request failed: the same key may be sent again once the cause is mended."""
        with self._records.write("drop_reply") as tx:
            tx.replies.drop(tenant, key)

    def note_replies(self, noted: Sequence[NotedReply]) -> None:
        """In place of what was noted under the same names."""
        with self._records.write("note_replies") as tx:
            tx.replies.drop_expired(self._clock())
            for one in noted:
                if one.body is None:
                    tx.replies.drop(one.tenant, one.name)
                else:
                    tx.replies.put(one.tenant, one.name, ReplyRow("", NOTED, one.body, one.expires_at))

    def noted_replies(self, prefix: str) -> list[NotedReply]:
        """Of all tenants, what was noted under names with that beginning and has not expired."""
        with self._records.read("noted_replies") as tx:
            found = tx.replies.beginning_with(prefix, self._clock())
        return [NotedReply(tenant, name, row.body, row.expires_at) for tenant, name, row in found]
