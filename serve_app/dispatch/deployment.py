"""The Serve shell of dispatch: one replica with the reply table and the rate limits, which hands out generations."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from serve_app.collaborators import DispatchLoad
from serve_app.dispatch.dispatcher import GenerationDispatcher
from serve_app.dispatch.lasting_replies import LastingReplies
from serve_app.dispatch.rates import Claim, Grant, Rate, RateLedger
from serve_app.dispatch.replies import ReplyTable
from serve_app.dispatch.reply import EndedReply, Opening, Reopened, Reply, Settled
from serve_app.dispatch.webhooks import WebhookSender
from serve_app.handles import HandleInference
from serve_app.job_types.results import Presenter
from serve_app.outbound import Outbound
from serve_app.settings import Settings
from storage.actor import StorageClient
from storage.jobs_client import JobsClient
from storage.ray_counters import of_this_process


class Dispatcher:
    """Implements `serve_app.collaborators.Dispatch`. Unhealthy, and so replaced by Serve, once a loop has ended."""

    def __init__(self, settings: Settings, inference: Any) -> None:
        self._replies = LastingReplies(ReplyTable(_now), JobsClient())
        self._rates = RateLedger()
        self._dispatcher = GenerationDispatcher(
            JobsClient(),
            HandleInference(inference),
            owner=f"dispatcher-{uuid.uuid4().hex[:12]}",
            slots=settings.replicas_max() * settings.generations_per_replica,
            drain_s=settings.drain_s,
        )
        s3 = settings.s3()
        store = StorageClient(s3, settings.breaker())
        self._outbound = Outbound(any_address=settings.webhooks.any_address, timeout_s=settings.webhooks.timeout_s)
        webhooks = WebhookSender(
            JobsClient(),
            Presenter(store, _now, s3.bucket, s3.prefix, settings.limits),
            self._outbound,
            secrets=settings.webhook_secrets(),
            counters=of_this_process(),
        )
        # Serve runs constructors on the replica's event loop.
        loop = asyncio.get_running_loop()
        self._restoring = loop.create_task(self._replies.restore())
        self._loops = [loop.create_task(self._dispatcher.run()), loop.create_task(webhooks.run())]

    async def check_health(self) -> None:
        if any(loop.done() for loop in self._loops):
            raise RuntimeError("a dispatch loop has ended")

    async def wake(self) -> None:
        self._dispatcher.wake()

    async def load(self) -> DispatchLoad:
        return self._dispatcher.load()

    async def open_reply(self, tenant: str, runpod_id: str, opening: Opening) -> str:
        return await self._replies.open(tenant, runpod_id, opening)

    async def hear_from(self, owner: str) -> list[tuple[str, str]]:
        await self._replies.ready()
        return self._replies.table.hear_from(owner)

    async def reopen_reply(self, tenant: str, runpod_id: str, *, owner: str, kept_s: float) -> Reopened:
        return await self._replies.reopen(tenant, runpod_id, owner=owner, kept_s=kept_s)

    async def settle_reply(self, ended: EndedReply) -> Settled | None:
        return await self._replies.settle(ended)

    async def cancel_reply(self, tenant: str, runpod_id: str) -> Reply | None:
        return await self._replies.cancel(tenant, runpod_id)

    async def count_replies(self, tenant: str) -> dict[str, int]:
        await self._replies.ready()
        return self._replies.table.counts(tenant)

    async def keep_replies(self, ended: Sequence[EndedReply]) -> None:
        for one in ended:
            self._replies.table.keep(one)

    async def hand_over_reply(self, tenant: str, runpod_id: str, *, to: str) -> bool:
        return await self._replies.hand_over(tenant, runpod_id, to=to)

    async def wait_reply(self, tenant: str, runpod_id: str, timeout_s: float) -> Reply | None:
        await self._replies.ready()
        return await self._replies.table.wait(tenant, runpod_id, timeout_s)

    async def drain_reply(self, tenant: str, runpod_id: str) -> bool:
        return self._replies.table.drain(tenant, runpod_id)

    async def take_permits(self, key: str, operation: str, rate: Rate, claim: Claim) -> Grant:
        return self._rates.take(key, operation, rate, claim)

    async def __del__(self) -> None:
        """Serve's graceful shutdown: stop handing out, let what is under way end, hand back what does not."""
        for loop in (*self._loops, self._restoring):
            loop.cancel()
        await asyncio.gather(*self._loops, self._restoring, return_exceptions=True)
        await self._outbound.close()


def _now() -> datetime:
    return datetime.now(UTC)
