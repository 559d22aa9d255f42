"""Final replies of /runsync on their way to the table that all ingress replicas share, many in one message.

Its client has such a reply already; what is kept is for a client that asks for the id again. A message for each
would cost more than the job. Where this is the only replica, whoever asks meanwhile asks here; where there are others,
the client's reply waits until its message has arrived.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable

from pydantic_core import to_json

from serve_app.collaborators import Dispatch
from serve_app.dispatch.reply import EndedReply, Reply
from serve_app.errors import ServiceUnavailable

logger = logging.getLogger(__name__)

MESSAGE_MAX = 256
MESSAGE_BYTES_MAX = 8 * 1024 * 1024
# A message costs as much as a dozen of these replies, however many are in it.
PAUSE_S = 0.25
RETRY_S = 1.0
WAITING_MAX = 2000
WAITING_BYTES_MAX = 64 * 1024 * 1024

Key = tuple[str, str]
Sleep = Callable[[float], Awaitable[None]]


class NearReplies:
    """One per ingress process. The oldest beyond the bounds are dropped while the shared table does not answer."""

    def __init__(self, dispatch: Dispatch, *, is_only_one: bool, sleep: Sleep = asyncio.sleep) -> None:
        self._dispatch = dispatch
        self._is_only_one = is_only_one
        self._sleep = sleep
        self._waiting: OrderedDict[Key, tuple[EndedReply, int]] = OrderedDict()
        self._bytes = 0
        self._sending: asyncio.Task[None] | None = None

    def get(self, tenant: str, runpod_id: str) -> Reply | None:
        """A reply that the shared table may not have yet."""
        waiting = self._waiting.get((tenant, runpod_id))
        return None if waiting is None else waiting[0].reply

    async def keep(self, ended: EndedReply) -> None:
        """Raises nothing: the reply itself is good, whether it can be found again or not."""
        size_bytes = len(to_json(ended.reply.output)) + (0 if ended.sent is None else ended.sent.size_bytes)
        self._waiting[ended.tenant, ended.runpod_id] = (ended, size_bytes)
        self._bytes += size_bytes
        while len(self._waiting) > WAITING_MAX or (self._bytes > WAITING_BYTES_MAX and len(self._waiting) > 1):
            self._drop(next(iter(self._waiting)))
        if self._sending is None or self._sending.done():
            self._sending = asyncio.create_task(self._send())
        if not self._is_only_one:
            await self.arrived(ended.tenant, ended.runpod_id)

    async def arrived(self, tenant: str, runpod_id: str) -> None:
        """Once the shared table has this reply, or could not be told."""
        while (tenant, runpod_id) in self._waiting:
            if not await self._send_some():
                return

    async def close(self) -> None:
        if self._sending is not None:
            self._sending.cancel()
            await asyncio.gather(self._sending, return_exceptions=True)
        while self._waiting and await self._send_some():
            pass

    async def _send(self) -> None:
        while self._waiting:
            if len(self._waiting) < MESSAGE_MAX:
                await self._sleep(PAUSE_S)
            if not await self._send_some():
                await self._sleep(RETRY_S)

    async def _send_some(self) -> bool:
        """Whether a message arrived."""
        some = self._next()
        try:
            await self._dispatch.keep_replies(some)
        except ServiceUnavailable:
            logger.warning("%d replies wait for the shared table, which does not answer", len(self._waiting))
            return False
        for ended in some:
            self._drop((ended.tenant, ended.runpod_id))
        return True

    def _next(self) -> list[EndedReply]:
        """The oldest that fit into a message, at least one."""
        some: list[EndedReply] = []
        left = MESSAGE_BYTES_MAX
        for ended, size_bytes in self._waiting.values():
            left -= size_bytes
            if some and (left < 0 or len(some) >= MESSAGE_MAX):
                break
            some.append(ended)
        return some

    def _drop(self, key: Key) -> None:
        dropped = self._waiting.pop(key, None)
        if dropped is not None:
            self._bytes -= dropped[1]
