"""Rate and concurrency limits per key, as an ASGI layer: RunPod's published ones, and one for everything else."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from starlette.types import ASGIApp, Receive, Scope, Send

from serve_app.dispatch.rates import Grant, Rate, RateLedger
from serve_app.errors import ServiceUnavailable, TooManyAtOnce, TooManyRequests
from serve_app.ingress.auth import Principal
from serve_app.settings import OperationLimit, RateLimitSettings

logger = logging.getLogger(__name__)

# A fortieth of a window is fetched at a time: most requests then ask nobody, and what a replica fetched and did not
# use is lost to the others only that far.
BLOCKS_PER_WINDOW = 40
# The shared count has an entry for each permit: a limit that is to be none would otherwise fill its memory.
BLOCK_MAX = 500
BLOCK_KEPT_S = 1.0
BUSY_RETRY_S = 1.0

_OPERATIONS = {
    "run": "run",
    "retry": "run",
    "runsync": "runsync",
    "status": "status",
    "status-sync": "status",
    "stream": "stream",
    "cancel": "cancel",
    "purge-queue": "purge",
}


class Permits(Protocol):
    """Where all replicas get their permits from."""

    async def take_permits(self, key: str, operation: str, rate: Rate, wanted: int) -> Grant:
        """Raises ServiceUnavailable."""
        ...


def operation_of(path: str) -> str:
    """The name under which a path's calls are counted: RunPod's own, or "other"."""
    parts = path.split("/")
    if len(parts) >= 4 and parts[1] == "v2":
        return _OPERATIONS.get(parts[3], "other")
    return "other"


@dataclass
class _Block:
    """Permits that were fetched and not used yet."""

    permits: int = 0
    kept_until_s: float = 0.0


class RateGate:
    """This replica's end of the limits.

    Calls per window are counted in one place for all replicas; while that place does not answer, this replica counts
    by itself. Calls at the same time are counted here, each replica admitting its share of the limit.
    """

    def __init__(
        self,
        shared: Permits,
        limits: RateLimitSettings,
        *,
        replicas: int,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._shared = shared
        self._limits = limits
        self._replicas = replicas
        self._clock_s = clock_s
        self._alone = RateLedger()
        self._blocks: defaultdict[tuple[str, str], _Block] = defaultdict(_Block)
        self._locks: defaultdict[tuple[str, str], asyncio.Lock] = defaultdict(asyncio.Lock)
        self._running: Counter[tuple[str, str]] = Counter()

    async def enter(self, key: str, operation: str) -> None:
        """Raises TooManyRequests, TooManyAtOnce. Each return is to be followed by one `leave`."""
        limit = self._limits.of(operation)
        if limit.concurrent is not None and self._running[key, operation] >= math.ceil(
            limit.concurrent / self._replicas
        ):
            raise TooManyAtOnce(BUSY_RETRY_S)
        self._running[key, operation] += 1
        try:
            await self._take(key, operation, limit)
        except BaseException:
            self.leave(key, operation)
            raise

    def leave(self, key: str, operation: str) -> None:
        self._running[key, operation] -= 1
        if self._running[key, operation] <= 0:
            del self._running[key, operation]

    async def _take(self, key: str, operation: str, limit: OperationLimit) -> None:
        block = self._blocks[key, operation]
        if self._used(block):
            return
        async with self._locks[key, operation]:
            # Another request may have fetched while this one waited.
            if self._used(block):
                return
            grant = await self._fetch(key, operation, limit)
            if grant.permits < 1:
                raise TooManyRequests(grant.retry_after_s)
            block.permits, block.kept_until_s = grant.permits - 1, self._clock_s() + BLOCK_KEPT_S

    def _used(self, block: _Block) -> bool:
        """Whether a permit was there to use."""
        if block.permits < 1 or self._clock_s() >= block.kept_until_s:
            return False
        block.permits -= 1
        return True

    async def _fetch(self, key: str, operation: str, limit: OperationLimit) -> Grant:
        rate = Rate(limit.amount, self._limits.window_s)
        wanted = min(max(1, limit.amount // BLOCKS_PER_WINDOW), BLOCK_MAX)
        try:
            return await self._shared.take_permits(key, operation, rate, wanted)
        except ServiceUnavailable:
            logger.warning("The shared rate limits did not answer; this replica counts %s by itself", operation)
            return self._alone.take(key, operation, rate, 1)


class RateLimit:
    """Lets a request of a known key through while its limits last. Stands behind Authentication."""

    def __init__(self, app: ASGIApp, gate: RateGate) -> None:
        self._app = app
        self._gate = gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        principal: Principal | None = scope.get("state", {}).get("principal")
        if scope["type"] != "http" or principal is None:
            await self._app(scope, receive, send)
            return
        operation = operation_of(scope["path"])
        await self._gate.enter(principal.key_id, operation)
        try:
            await self._app(scope, receive, send)
        finally:
            self._gate.leave(principal.key_id, operation)
