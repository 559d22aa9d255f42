"""A circuit breaker that lets exactly one probe through.

    closed --failure_threshold consecutive failures--> open --recovery_s--> half-open --probe succeeds--> closed
                                                        ^                       |
                                                        +-----probe fails-------+

Plain state and an injected monotonic clock: no I/O, no locks. It belongs to one event loop (or one thread). It
serves alike as the breaker of one storage actor and as the one that all of them share.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

# How soon a probe's result may be known.
ASK_PROBE_AGAIN_S = 1.0


class BreakerState(StrEnum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class BreakerMode(StrEnum):
    """Who decides: the breaker itself, or an operator."""

    AUTOMATIC = "automatic"
    FORCED_OPEN = "forced_open"
    FORCED_CLOSED = "forced_closed"


class Outcome(StrEnum):
    """What a call says about the backend. NEUTRAL: nothing, for example because it was cancelled."""

    SUCCESS = "success"
    FAILURE = "failure"
    NEUTRAL = "neutral"


@dataclass(frozen=True)
class Permit:
    """Leave for one call. `generation` ages with every transition; `probe` is the half-open call's number."""

    generation: int
    probe: int | None = None


@dataclass(frozen=True)
class BreakerSnapshot:
    """`retry_after_s` is 0 when a call would be admitted now. While a probe is under way nobody knows more than that
    it may soon be over."""

    state: BreakerState
    generation: int
    consecutive_failures: int
    retry_after_s: float
    mode: BreakerMode = BreakerMode.AUTOMATIC


class BreakerOpenError(Exception):
    """No call now. Internal: callers of storage see StorageUnavailable."""

    def __init__(self, retry_after_s: float) -> None:
        super().__init__(retry_after_s)
        self.retry_after_s = retry_after_s


class CircuitBreaker:
    """Every permit from `admit` is settled once, with an outcome.

    A result from an older generation is ignored: a call that began before the breaker opened says nothing about
    the backend now. A probe that is not settled within `probe_timeout_s` is given up, and the next call probes.
    """

    def __init__(
        self,
        failure_threshold: int,
        recovery_s: float,
        probe_timeout_s: float,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._failure_threshold = failure_threshold
        self._recovery_s = recovery_s
        self._probe_timeout_s = probe_timeout_s
        self._clock = clock
        self._mode = BreakerMode.AUTOMATIC
        self._state = BreakerState.CLOSED
        self._generation = 0
        self._consecutive_failures = 0
        self._opened_at = 0.0
        self._probes_started = 0
        self._probe: int | None = None
        self._probe_started_at = 0.0

    def admit(self) -> Permit:
        """Raises BreakerOpenError."""
        if self._wait_s() > 0:
            raise BreakerOpenError(self._retry_after_s())
        if self._state is BreakerState.CLOSED:
            return Permit(self._generation)
        if self._state is BreakerState.OPEN:
            self._enter(BreakerState.HALF_OPEN)
        self._probes_started += 1
        self._probe = self._probes_started
        self._probe_started_at = self._clock()
        return Permit(self._generation, self._probe)

    def settle(self, permit: Permit, outcome: Outcome) -> None:
        if permit.generation != self._generation or permit.probe != self._probe:
            return
        self._probe = None
        if outcome is Outcome.SUCCESS:
            self._consecutive_failures = 0
            if self._state is BreakerState.HALF_OPEN:
                self._enter(BreakerState.CLOSED)
        elif outcome is Outcome.FAILURE:
            self._consecutive_failures += 1
            if self._mode is BreakerMode.FORCED_CLOSED:
                return
            if self._state is BreakerState.HALF_OPEN or self._consecutive_failures >= self._failure_threshold:
                self._opened_at = self._clock()
                self._enter(BreakerState.OPEN)

    def force(self, mode: BreakerMode) -> None:
        """Let an operator decide, or the breaker again. A change forgets the failures and all calls under way.

        Forced open, no call goes out, not even a probe. Forced closed, every call does. Automatic starts closed.
        """
        if mode is self._mode:
            return
        self._mode = mode
        self._consecutive_failures = 0
        self._enter(BreakerState.OPEN if mode is BreakerMode.FORCED_OPEN else BreakerState.CLOSED)

    def snapshot(self) -> BreakerSnapshot:
        return BreakerSnapshot(
            self._state, self._generation, self._consecutive_failures, self._retry_after_s(), self._mode
        )

    def _retry_after_s(self) -> float:
        wait_s = self._wait_s()
        return min(wait_s, ASK_PROBE_AGAIN_S) if self._state is BreakerState.HALF_OPEN else wait_s

    def _wait_s(self) -> float:
        """Until a call is admitted, as far as no outcome changes that."""
        if self._mode is BreakerMode.FORCED_OPEN:
            # Nobody knows how long; the usual time is when asking again makes sense.
            return self._recovery_s
        match self._state:
            case BreakerState.CLOSED:
                return 0.0
            case BreakerState.OPEN:
                return max(0.0, self._opened_at + self._recovery_s - self._clock())
            case BreakerState.HALF_OPEN:
                if self._probe is None:
                    return 0.0
                return max(0.0, self._probe_started_at + self._probe_timeout_s - self._clock())

    def _enter(self, state: BreakerState) -> None:
        self._state = state
        self._generation += 1
        self._probe = None
