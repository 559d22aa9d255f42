"""Tells clients of the ends of their jobs, signed by the Standard Webhooks scheme (standardwebhooks.com).

Which webhooks are due, and how often each was tried, stands in the job records; so a restart forgets none, and nothing
that goes wrong here touches a job. Tenants take turns, and one whose receivers do not answer holds only its own places.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import Counter
from datetime import datetime
from typing import Any

from standardwebhooks.webhooks import Webhook as Signer

from serve_app.collaborators import JobsApi
from serve_app.dispatch.attempt import Sleep
from serve_app.dispatch.slots import Slots
from serve_app.errors import AddressRefused, OutboundFailed
from serve_app.ingress.errors import where_raised
from serve_app.ingress.runpod_status import status_object, told_status
from serve_app.job_types.results import Presenting
from serve_app.outbound import Outbound
from serve_app.webhook_secrets import WebhookSecrets
from storage.counters import WEBHOOK_FAILURES, Counters
from storage.errors import JobError, StorageError
from storage.webhook_record import Webhook

logger = logging.getLogger(__name__)

# Each may hold an input of 10 MB.
AT_ONCE_MAX = 32
AT_ONCE_OF_TENANT_MAX = 8


class WebhookSender:
    def __init__(
        self,
        jobs: JobsApi,
        presenting: Presenting,
        outbound: Outbound,
        *,
        secrets: WebhookSecrets,
        counters: Counters,
        poll_s: float = 1.0,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        self._jobs = jobs
        self._presenting = presenting
        self._outbound = outbound
        self._secrets = secrets
        self._counters = counters
        self._slots = Slots(AT_ONCE_MAX, poll_s=poll_s, sleep=sleep)
        self._under_way: Counter[str] = Counter()

    async def run(self) -> None:
        """Until cancelled. What is under way then is due again when its lease has run out."""
        try:
            while True:
                try:
                    await self.start_due()
                except JobError as error:
                    logger.warning("Webhooks could not be looked up: %s", error.code)
                await self._slots.next_look()
        finally:
            await self._slots.end(within_s=0.0)

    async def start_due(self) -> list[asyncio.Task[None]]:
        """An attempt at each webhook that is due and has a place. Raises JobError."""
        free = self._slots.free
        if free <= 0:
            return []
        taken = await self._jobs.take_webhooks(
            free, limit_of_tenant=AT_ONCE_OF_TENANT_MAX, under_way=dict(self._under_way)
        )
        self._under_way.update(webhook.tenant for webhook in taken)
        return [self._slots.start(self._attend(webhook)) for webhook in taken]

    async def _attend(self, webhook: Webhook) -> None:
        """One attempt, from its start to its noted outcome. Raises nothing but CancelledError."""
        try:
            await self._settle(webhook, delivered=await self._is_delivered(webhook))
        finally:
            self._under_way[webhook.tenant] -= 1
            if self._under_way[webhook.tenant] <= 0:
                del self._under_way[webhook.tenant]

    async def _settle(self, webhook: Webhook, *, delivered: bool) -> None:
        try:
            again = await self._jobs.settle_webhook(webhook, delivered=delivered)
        except Exception as error:  # noqa: BLE001 its lease runs out; the others must go on
            logger.error("The outcome of webhook %s was not noted: %s", webhook.message_id, _reason(error))
            return
        if not delivered and not again:
            logger.error("Webhook %s was given up", webhook.message_id)

    async def _is_delivered(self, webhook: Webhook) -> bool:
        try:
            await self._deliver(webhook)
        except (AddressRefused, OutboundFailed, StorageError, JobError) as error:
            self._note_failure(webhook, error)
        except Exception as error:  # noqa: BLE001 what one client sent must not end the webhooks of all
            self._note_failure(webhook, error)
            logger.error("Unexpected at webhook %s: %s", webhook.message_id, where_raised(error))
        else:
            return True
        return False

    def _note_failure(self, webhook: Webhook, error: Exception) -> None:
        reason = _reason(error)
        logger.warning("Webhook %s, attempt %d: %s", webhook.message_id, webhook.attempts, reason)
        self._counters.add(WEBHOOK_FAILURES, reason=reason)

    async def _deliver(self, webhook: Webhook) -> None:
        """Raises AddressRefused, OutboundFailed, StorageError, JobError."""
        body = json.dumps({**await self._status(webhook), "input": webhook.input})
        await self._outbound.post(webhook.url, body.encode(), self._headers(webhook, body, self._presenting.clock()))

    async def _status(self, webhook: Webhook) -> dict[str, Any]:
        if webhook.job_id is None:
            return await told_status(self._presenting, webhook.body or {})
        record = await self._jobs.get(webhook.job_id, tenant=webhook.tenant)
        return await status_object(self._presenting, record, webhook.message_id)

    def _headers(self, webhook: Webhook, body: str, now: datetime) -> dict[str, str]:
        return {
            "Content-Type": "application/json",
            "User-Agent": "raylora",
            "webhook-id": webhook.message_id,
            "webhook-timestamp": str(int(now.timestamp())),
            "webhook-signature": Signer(self._secrets.of(webhook.tenant)).sign(webhook.message_id, now, body),
        }


def _reason(error: Exception) -> str:
    """Without the address, which may hold a secret of the client."""
    return error.reason if isinstance(error, OutboundFailed) else str(getattr(error, "code", type(error).__name__))
