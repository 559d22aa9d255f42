"""The parts of `storage.jobs.Jobs` beside the life cycle itself: reading a job's events, and telling of its end."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, TypeAlias

from storage.errors import JobNotFound
from storage.job_record import Drained, JobEvent, JobRecord
from storage.records import Records
from storage.webhook_record import WEBHOOK_ATTEMPTS_MAX, WEBHOOK_LEASE_S, Webhook, retry_delay_s

DRAIN_MAX = 200
PREVIEWS = "previews"
WEBHOOKS_TAKEN_MAX = 16
NONE_UNDER_WAY: Mapping[str, int] = {}

EventList: TypeAlias = list[JobEvent]
WebhookList: TypeAlias = list[Webhook]


class JobStreams:
    """Like `Jobs`: every method is one transaction, raises RecordsError when the database fails, and JobNotFound for
    a job of another tenant.
    """

    _records: Records
    _clock: Callable[[], datetime]

    def events(self, job_id: str, *, tenant: str | None, after: int = 0, limit: int = DRAIN_MAX) -> EventList:
        """What was reported after the event numbered `after`, oldest first. Changes nothing."""
        with self._records.read("events") as tx:
            visible(tx.get(job_id), job_id, tenant)
            return tx.events_after(job_id, after, limit)

    def drain(self, job_id: str, *, tenant: str) -> Drained:
        """What was reported since the last drain; each event is given out once, whoever asks."""
        with self._records.read("drain") as tx:
            record = visible(tx.get(job_id), job_id, tenant)
            seq, ended = tx.drained(job_id)
            if not tx.events_after(job_id, seq, 1) and (ended or not record.state.is_terminal):
                return Drained(record=record, events=(), is_end=ended, was_ended=ended)
        now = self._clock()
        with self._records.write("drain") as tx:
            record = visible(tx.get(job_id, lock=True), job_id, tenant)
            seq, was_ended = tx.drained(job_id)
            found = tx.events_after(job_id, seq, DRAIN_MAX + 1)
            given = found[:DRAIN_MAX]
            is_end = record.state.is_terminal and len(found) <= DRAIN_MAX
            tx.set_drained(job_id, given[-1].seq if given else seq, ended=is_end, now=now)
        return Drained(record=record, events=tuple(given), is_end=is_end, was_ended=was_ended)

    def add_webhook(self, *, tenant: str, url: str, input: dict[str, Any], body: dict[str, Any]) -> None:  # noqa: A002
        """Tell of a job that has no record and has ended: `body` is its status object."""
        due = Webhook(id=new_webhook_id(), tenant=tenant, url=url, input=input, body=body, due_at=self._clock())
        with self._records.write("add_webhook") as tx:
            tx.add_webhook(due)

    def take_webhooks(
        self,
        limit: int = WEBHOOKS_TAKEN_MAX,
        *,
        limit_of_tenant: int = WEBHOOKS_TAKEN_MAX,
        under_way: Mapping[str, int] = NONE_UNDER_WAY,
    ) -> WebhookList:
        """Webhooks to send now, each counted as an attempt. One that is not settled within WEBHOOK_LEASE_S is due
        again, unless that was its last attempt.

        Of each tenant those that waited longest, and no more than make `limit_of_tenant` with what it has `under_way`.
        The tenant that has least under way comes first.
        """
        now = self._clock()
        # Senders ask every second, and there is seldom one: readers hold up no writer.
        with self._records.read("take_webhooks") as tx:
            room = {tenant: limit_of_tenant - under_way.get(tenant, 0) for tenant in tx.tenants_of_due_webhooks(now)}
        room = {tenant: places for tenant, places in room.items() if places > 0}
        if not room:
            return []
        with self._records.write("take_webhooks") as tx:
            due = [
                (under_way.get(tenant, 0) + place, webhook)
                for tenant, places in room.items()
                for place, webhook in enumerate(tx.due_webhooks(tenant, now, places))
            ]
            due.sort(key=lambda placed: (placed[0], placed[1].due_at))
            attempts = [_next_attempt(webhook, now) for _, webhook in due[:limit]]
            for webhook in attempts:
                tx.save_webhook(webhook)
        return [webhook for webhook in attempts if webhook.done_at is None]

    def settle_webhook(self, webhook: Webhook, *, delivered: bool) -> bool:
        """How an attempt ended. Returns whether there will be another one."""
        now = self._clock()
        with self._records.write("settle_webhook") as tx:
            known = tx.webhook(webhook.id)
            if known is None or (known.round, known.attempts) != (webhook.round, webhook.attempts):
                return False
            is_over = delivered or known.attempts >= WEBHOOK_ATTEMPTS_MAX
            due_at = None if is_over else now + timedelta(seconds=retry_delay_s(known.attempts))
            tx.save_webhook(known.model_copy(update={"due_at": due_at, "done_at": now if is_over else None}))
        return not is_over


def visible(record: JobRecord | None, job_id: str, tenant: str | None) -> JobRecord:
    """Raises JobNotFound where there is no record, or it is another tenant's."""
    if record is None or (tenant is not None and record.tenant != tenant):
        raise JobNotFound(job_id)
    return record


def _next_attempt(webhook: Webhook, now: datetime) -> Webhook:
    """One more, under a lease; of one that has had them all, its end."""
    if webhook.attempts >= WEBHOOK_ATTEMPTS_MAX:
        return webhook.model_copy(update={"due_at": None, "done_at": now})
    leased = now + timedelta(seconds=WEBHOOK_LEASE_S)
    return webhook.model_copy(update={"attempts": webhook.attempts + 1, "due_at": leased})


def new_webhook_id() -> str:
    return secrets.token_hex(12)


def progress_events(before: dict[str, Any], progress: dict[str, Any] | None) -> Sequence[dict[str, Any]]:
    """The event that a new progress makes: none where it is as before; of the previews only those that were added."""
    if progress is None or progress == before:
        return ()
    known = {preview.get("key") for preview in before.get(PREVIEWS, [])}
    added = [preview for preview in progress.get(PREVIEWS, []) if preview.get("key") not in known]
    plain = {name: value for name, value in progress.items() if name != PREVIEWS}
    return ({**plain, PREVIEWS: added} if added else plain,)
