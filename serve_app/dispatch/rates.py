"""How often each key may call: counted here for all ingress replicas together. Plain: runs without Ray."""

from __future__ import annotations

import time
from dataclasses import dataclass

from limits import RateLimitItemPerSecond
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter


@dataclass(frozen=True)
class Rate:
    """At most `amount` calls in any `window_s` seconds."""

    amount: int
    window_s: int


@dataclass(frozen=True)
class Grant:
    """`permits` calls may go on; where it is 0, the next may after `retry_after_s`."""

    permits: int
    retry_after_s: float = 0.0


class RateLedger:
    """Calls by key and operation, in a moving window. The count itself is the `limits` library's."""

    def __init__(self) -> None:
        self._limiter = MovingWindowRateLimiter(MemoryStorage())

    def take(self, key: str, operation: str, rate: Rate, wanted: int) -> Grant:
        """Up to `wanted` permits at once, as many as the window still holds."""
        item = RateLimitItemPerSecond(rate.amount, rate.window_s)
        left = self._limiter.get_window_stats(item, operation, key).remaining
        permits = min(wanted, max(0, left))
        if permits > 0 and self._limiter.hit(item, operation, key, cost=permits):
            return Grant(permits)
        reset_at = self._limiter.get_window_stats(item, operation, key).reset_time
        return Grant(0, max(0.0, reset_at - time.time()))
