"""Rate and concurrency limits per key, as an ASGI layer: RunPod's published ones, and one for everything else."""

from __future__ import annotations

import asyncio
import logging
import math
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from starlette.types import ASGIApp, Receive, Scope, Send

from serve_app.dispatch.rates import Claim, Grant, Rate, RateLedger
from serve_app.errors import ServiceUnavailable, TooManyAtOnce, TooManyRequests
from serve_app.ingress.auth import Principal
from serve_app.settings import OperationLimit, RateLimitSettings

logger = logging.getLogger(__name__)

# All replicas together hold a fortieth of a limit at most, so that most requests ask nobody. What is held and not used,
# and as much again of what was used and not told yet, is all that one replica's callers can lack because of the others:
# a key that stays a twentieth below its limit is never refused.
BLOCKS_PER_WINDOW = 40
# The shared count has an entry for each permit: a limit that is to be none would otherwise fill its memory.
BLOCK_MAX = 500
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

    async def take_permits(self, key: str, operation: str, rate: Rate, claim: Claim) -> Grant:
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
    """Permits that the claim `granted_by` brought beside its own, and how many of them are left."""

    claims: int = 0
    granted_by: int = 0
    granted: int = 0
    left: int = 0
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
        self._holder = uuid.uuid4().hex
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
            grant = await self._fetch(block, key, operation, limit)
            if grant.permits < 1:
                raise TooManyRequests(grant.retry_after_s)

    def _used(self, block: _Block) -> bool:
        """Whether a permit was there to use."""
        if block.left < 1 or self._clock_s() >= block.kept_until_s:
            return False
        block.left -= 1
        return True

    async def _fetch(self, block: _Block, key: str, operation: str, limit: OperationLimit) -> Grant:
        """One permit to use now, and a new block, or none of both."""
        rate = Rate(limit.amount, self._limits.window_s)
        wanted = min(max(1, limit.amount // (BLOCKS_PER_WINDOW * self._replicas)), BLOCK_MAX)
        block.claims += 1
        claim = Claim(self._holder, block.claims, wanted, block.granted_by, block.granted - block.left)
        # From before the claim: it is then used up, or given up, before those who granted it count on that.
        kept_until_s = self._clock_s() + rate.window_s
        try:
            grant = await self._shared.take_permits(key, operation, rate, claim)
        except ServiceUnavailable:
            logger.warning("The shared rate limits did not answer; this replica counts %s by itself", operation)
            return self._alone.take(key, operation, rate, Claim(self._holder, block.claims, 1))
        block.granted_by, block.kept_until_s = claim.number, kept_until_s
        block.granted = block.left = max(0, grant.permits - 1)
        return grant


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
