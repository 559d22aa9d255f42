"""How often each key may call: counted here for all ingress replicas together. Plain: runs without Ray."""

from __future__ import annotations

import time
from collections import defaultdict
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


@dataclass(frozen=True)
class Claim:
    """Asks for `wanted` permits, of which one is used at once and the others within a window.

    `number` counts the claims of a `holder` upwards, for each key and operation. What came of the permits that it held
    is told with its next claim: it has `used` so many of those that its claim `accounted` got it beside the first.
    """

    holder: str
    number: int
    wanted: int
    accounted: int = 0
    used: int = 0


@dataclass(frozen=True)
class _Hold:
    """Permits of which it is not known yet when they are used, or whether. None of it concerns a window any more from
    `until` on: a holder that is silent till then is lost, or will say nothing that matters."""

    number: int
    permits: int
    until: float


class RateLedger:
    """Calls by key and operation, in a moving window. The count itself is the `limits` library's.

    What a holder may still use counts like what was used, so that never more than the amount is used in a window. What
    it did use counts from when it tells, which is later: each holder takes at most what it is granted at a time from
    what the others could have, and as much again, and nothing where that is one permit.
    """

    def __init__(self) -> None:
        self._limiter = MovingWindowRateLimiter(MemoryStorage())
        self._holds: defaultdict[tuple[str, str], dict[str, _Hold]] = defaultdict(dict)

    def take(self, key: str, operation: str, rate: Rate, claim: Claim) -> Grant:
        """Up to `claim.wanted` permits at once, as many as the window still holds.

        None for a claim that arrives after a later one of its holder, which waits for it no longer.
        """
        item = RateLimitItemPerSecond(rate.amount, rate.window_s)
        holds = self._holds[key, operation]
        before = holds.get(claim.holder)
        if before is not None and before.number >= claim.number:
            return Grant(0)
        used = 0 if before is None or before.number != claim.accounted else min(claim.used, before.permits)
        holds.pop(claim.holder, None)
        if used > 0:
            # There is room for them: they were held.
            self._limiter.hit(item, operation, key, cost=used)
        now = time.time()
        for holder in [holder for holder, hold in holds.items() if hold.until <= now]:
            del holds[holder]
        left = self._limiter.get_window_stats(item, operation, key).remaining - sum(
            hold.permits for hold in holds.values()
        )
        permits = min(claim.wanted, max(0, left))
        if permits > 0 and self._limiter.hit(item, operation, key):
            if permits > 1:
                holds[claim.holder] = _Hold(claim.number, permits - 1, now + 2 * rate.window_s)
            return Grant(permits)
        reset_at = self._limiter.get_window_stats(item, operation, key).reset_time
        return Grant(0, max(0.0, reset_at - time.time()))
