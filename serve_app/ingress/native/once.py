"""`Idempotency-Key`: the same key and request get the first reply again. Kept with the records, for all replicas.

Presigned URLs are not kept: a reply that has any is told again with new ones.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from serve_app.ingress.envelope import read_idempotency_key, read_object
from serve_app.ingress.native.calls import key_name, request_digest, tenant_of
from serve_app.job_types.context import Services
from storage.errors import JobError
from storage.jobs import Jobs
from storage.kept_replies import KeptReply

logger = logging.getLogger(__name__)

REPLAYED_HEADER = "Idempotent-Replayed"
HOLD_MARGIN_S = 60.0
WRITES = frozenset({"POST", "DELETE"})

Handler = Callable[[Request], Coroutine[Any, Any, Response]]
Renew = Callable[[str, dict[str, Any], dict[str, Any]], Awaitable[dict[str, Any]]]
"""Of a tenant, a kept reply whose URLs are empty, and the request that it answers: the reply with URLs made now."""


class OnceOnly:
    """Runs keyed requests. A request that was begun goes on when its client has gone, so that its reply is kept.

    Only successes are kept: a request that was refused changed nothing and may be sent again, mended causes included.
    """

    def __init__(self, services: Services, renewals: Mapping[str, Renew]) -> None:
        """`renewals`: by the path of the route, for each whose replies hold URLs."""
        self._services = services
        self._renewals = renewals
        self._tasks: set[asyncio.Task[Response]] = set()

    async def answer(self, request: Request, handle: Handler, path: str) -> Response:
        """Raises IdempotencyConflict, IdempotencyInFlight, and whatever `handle` raises."""
        key = read_idempotency_key(request.headers.get("idempotency-key"))
        if key is None or request.method not in WRITES:
            return await handle(request)
        tenant, name = tenant_of(request), key_name(key)
        digest = request_digest(request, await request.body())
        hold_s = self._services.limits.quick_job_timeout_s + HOLD_MARGIN_S
        known = await self._services.jobs.call(Jobs.open_reply, tenant, name, digest, hold_s=hold_s)
        renew = self._renewals.get(path)
        if known is not None:
            return _replayed(known.status, known.body if renew is None else await _renewed(renew, request, known))
        task = asyncio.create_task(self._first(request, handle, tenant, name, digest, holds_urls=renew is not None))
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return await asyncio.shield(task)

    async def _first(
        self, request: Request, handle: Handler, tenant: str, name: str, digest: str, *, holds_urls: bool
    ) -> Response:
        try:
            response = await handle(request)
        except BaseException:
            await self._drop(tenant, name)
            raise
        if response.status_code >= 300:
            await self._drop(tenant, name)
            return response
        body = bytes(response.body).decode()
        reply = KeptReply(response.status_code, json.dumps(_without_urls(json.loads(body))) if holds_urls else body)
        await self._services.jobs.call(
            Jobs.keep_reply, tenant, name, digest, reply, kept_s=self._services.limits.idempotency_kept_s
        )
        return response

    def _ended(self, task: asyncio.Task[Response]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            # Marks an error as seen that only a client would have read who has gone.
            task.exception()

    async def _drop(self, tenant: str, name: str) -> None:
        try:
            await self._services.jobs.call(Jobs.drop_reply, tenant, name)
        except JobError as error:
            # The mark ends by itself; what the client must learn is the error that came first.
            logger.warning("an idempotency key could not be freed: %s", error.code)


async def _renewed(renew: Renew, request: Request, known: KeptReply) -> str:
    asked = read_object(await request.body())
    return json.dumps(await renew(tenant_of(request), json.loads(known.body), asked))


def _without_urls(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_urls(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {name: "" if name == "url" else _without_urls(item) for name, item in value.items()}


def _replayed(status: int, body: str) -> Response:
    is_empty = status == 204
    media_type = None if is_empty else "application/json"
    return Response(None if is_empty else body, status, {REPLAYED_HEADER: "true"}, media_type)


def once_route(once: OnceOnly) -> type[APIRoute]:
    """The route class of a router whose writing routes honour the header."""

    class OnceRoute(APIRoute):
        def get_route_handler(self) -> Handler:
            handle = super().get_route_handler()

            async def keyed(request: Request) -> Response:
                return await once.answer(request, handle, self.path)

            return keyed

    return OnceRoute
