"""The one owner of retries: deadline( retry( place( breaker( attempt timeout( call and its body ))))).

An open breaker is not retried. Attempts and total time are both bounded, waits have full jitter
(https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/), and a budget shared by all calls
keeps retries from multiplying the load on a backend that is already failing.

A timeout is retried, but the breaker does not hear of it where it tells nothing about the backend: the backend has
answered another attempt since this one began, or this process has not run for a good part of the time. How many
attempts run at once adapts to how they fare.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import tenacity

from storage.breaker import BreakerOpenError, BreakerState, Outcome
from storage.congestion import Lateness, Window
from storage.counters import ATTEMPTS, BREAKER_STATE, OPERATIONS, RETRIES, Counters, Tally
from storage.deadlines import is_cut
from storage.errors import StorageError, StorageFailed, StorageTimeout, StorageUnavailable
from storage.gate import Admission, Gate
from storage.settings import S3Settings

T = TypeVar("T")

logger = logging.getLogger(__name__)

# Of an attempt's time: less is an event loop that is merely busy.
LOST_S_MIN, LOST_SHARE_MIN = 1.0, 0.25
THROTTLED = "throttled"

STATE_NUMBERS = {BreakerState.CLOSED: 0.0, BreakerState.HALF_OPEN: 1.0, BreakerState.OPEN: 2.0}


class TransientFaultError(Exception):
    """An attempt failed in a way that another attempt may not. Internal to storage.

    `reason` is one of our own words. `counts`: the breaker hears of it. `timed_out`: nobody knows whether the
    backend acted. `final` is raised, instead of StorageFailed, when no attempt is left.
    """

    def __init__(
        self, reason: str, *, counts: bool = True, timed_out: bool = False, final: StorageError | None = None
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.counts = counts
        self.timed_out = timed_out
        self.final = final


@dataclass(frozen=True)
class Policy:
    """Bounds of one operation.

    The n-th wait is uniform between 0 and min(backoff_max_s, backoff_initial_s * 2^(n - 1)) seconds.
    """

    attempts_max: int
    attempt_timeout_s: float
    deadline_s: float
    backoff_initial_s: float
    backoff_max_s: float
    throughput_min_bytes_per_s: int

    @classmethod
    def of(cls, settings: S3Settings) -> Policy:
        return cls(
            attempts_max=settings.attempts_max,
            attempt_timeout_s=settings.attempt_timeout_s,
            deadline_s=settings.deadline_s,
            backoff_initial_s=settings.backoff_initial_s,
            backoff_max_s=settings.backoff_max_s,
            throughput_min_bytes_per_s=settings.throughput_min_bytes_per_s,
        )


class RetryBudget:
    """Tokens for retries, shared by all operations: 5 a retry, 10 after a timeout that the breaker hears of.

    A success pays back what its own last retry cost, or 1. botocore's standard mode has the same numbers
    (`botocore.retries.standard.RetryQuotaChecker`).
    """

    RETRY_COST = 5
    TIMEOUT_COST = 10

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._available = capacity

    def take(self, *, timed_out: bool) -> int:
        """What was taken; 0 when too little is left."""
        cost = self.TIMEOUT_COST if timed_out else self.RETRY_COST
        if cost > self._available:
            return 0
        self._available -= cost
        return cost

    def give_back(self, taken: int) -> None:
        self._available = min(self._capacity, self._available + max(1, taken))


@dataclass
class Attempt:
    """Given to each attempt. `ambiguous`: an earlier one may have had its effect, so look before writing again.
    `allowed_s` is what moving its bytes may take."""

    number: int
    ambiguous: bool
    probe: bool
    allowed_s: float
    _throughput_min_bytes_per_s: int
    _scopes: tuple[asyncio.Timeout, ...] = field(repr=False)
    observed: bool = True

    def allow_for(self, size_bytes: int) -> None:
        """Extend the attempt and the deadline by the time that so many bytes may take."""
        extra_s = size_bytes / self._throughput_min_bytes_per_s
        self.allowed_s += extra_s
        for scope in self._scopes:
            when = scope.when()
            if when is not None:
                scope.reschedule(when + extra_s)

    @asynccontextmanager
    async def standing_still(self) -> AsyncIterator[None]:
        """For waits of our own: the deadline goes on, the attempt's time does not."""
        limit, clock = self._scopes[0], asyncio.get_running_loop().time
        end_s, began_s = limit.when(), clock()
        limit.reschedule(None)
        try:
            yield
        finally:
            limit.reschedule(None if end_s is None else end_s + clock() - began_s)

    def made_no_call(self) -> None:
        """The attempt succeeded without asking the backend: its success says nothing about it."""
        self.observed = False


@dataclass
class _Run:
    """What one operation remembers between its attempts."""

    operation: str
    deadline: asyncio.Timeout
    attempts: int = 0
    ambiguous: bool = False
    excused: bool = False
    taken: int = 0


class Resilience:
    """Runs operations against one backend under one policy. Belongs to one event loop."""

    def __init__(
        self,
        gate: Gate,
        policy: Policy,
        budget: RetryBudget,
        *,
        max_concurrency: int,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        clock: Callable[[], float] = time.monotonic,
        lateness: Lateness | None = None,
        counters: Counters | None = None,
    ) -> None:
        self._clock = clock
        self._lateness = lateness or Lateness(clock=clock)
        self._answered_at_s = float("-inf")
        self._counters = counters or Tally()
        self._shown: BreakerState | None = None
        self.gate = gate
        self.policy = policy
        self._budget = budget
        self._window = Window(max_concurrency, clock=clock)
        self._sleep = sleep

    @property
    def attempts_in_flight(self) -> int:
        """Those that need a place."""
        return self._window.held

    async def call(
        self,
        operation: str,
        attempt: Callable[[Attempt], Awaitable[T]],
        *,
        size_bytes: int = 0,
        deadline_s: float | None = None,
        needs_place: bool = True,
    ) -> T:
        """Run `attempt` until it succeeds, raises anything but TransientFaultError, or the bounds are reached.

        `size_bytes` is what an attempt is known to move. `needs_place` False is for calls that must not wait behind
        the others. Raises StorageUnavailable, StorageTimeout, StorageFailed, a fault's `final` error, and whatever
        `attempt` raises.
        """
        result = "error"
        try:
            answer = await self._bounded(operation, attempt, size_bytes, deadline_s, needs_place=needs_place)
            result = "ok"
            return answer
        except StorageError as error:
            result = error.code
            raise
        except asyncio.CancelledError:
            result = "cancelled"
            raise
        finally:
            self._counters.add(OPERATIONS, operation=operation, result=result)
            self.show_breaker()

    def show_breaker(self) -> None:
        """Its state, where it has changed since it was last shown."""
        state = self.gate.snapshot().state
        if state is not self._shown:
            self._shown = state
            self._counters.show(BREAKER_STATE, STATE_NUMBERS[state])

    async def _bounded(
        self,
        operation: str,
        attempt: Callable[[Attempt], Awaitable[T]],
        size_bytes: int,
        deadline_s: float | None,
        *,
        needs_place: bool,
    ) -> T:
        extra_s = size_bytes / self.policy.throughput_min_bytes_per_s
        total_s = (self.policy.deadline_s if deadline_s is None else deadline_s) + extra_s
        try:
            async with asyncio.timeout(total_s) as deadline:
                run = _Run(operation, deadline)
                return await self._retried(run, attempt, extra_s, needs_place=needs_place)
        except TimeoutError as error:
            if not deadline.expired():
                raise
            raise StorageTimeout(operation, total_s) from error
        except BreakerOpenError as error:
            raise StorageUnavailable(operation, error.retry_after_s, run.attempts) from error
        except TransientFaultError as fault:
            raise self._last_word(run, fault, total_s) from fault

    async def _retried(
        self, run: _Run, attempt: Callable[[Attempt], Awaitable[T]], extra_s: float, *, needs_place: bool
    ) -> T:
        try:
            result = await self._placed(run, attempt, extra_s, needs_place=needs_place)
        except TransientFaultError as fault:
            result = await self._again(run, fault, attempt, extra_s, needs_place=needs_place)
        self._budget.give_back(run.taken)
        return result

    async def _again(
        self,
        run: _Run,
        first: TransientFaultError,
        attempt: Callable[[Attempt], Awaitable[T]],
        extra_s: float,
        *,
        needs_place: bool,
    ) -> T:
        """The retries, after the `first` attempt's fault.

        Only calls that need them come here: what tenacity itself does takes twice as long as everything else that this
        class does for a call that succeeds at once.
        """
        policy = self.policy
        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception(lambda error: self._may_retry(run, error)),
            stop=tenacity.stop_after_attempt(policy.attempts_max),
            wait=tenacity.wait_random_exponential(multiplier=policy.backoff_initial_s, max=policy.backoff_max_s),
            sleep=self._sleep,
            reraise=True,
        )
        async for trial in retrying:
            with trial:
                if trial.retry_state.attempt_number == 1:
                    raise first
                result = await self._placed(run, attempt, extra_s, needs_place=needs_place)
        return result

    async def _placed(
        self, run: _Run, attempt: Callable[[Attempt], Awaitable[T]], extra_s: float, *, needs_place: bool
    ) -> T:
        if not needs_place:
            return await self._attempted(run, attempt, extra_s)
        async with self._window.place():
            return await self._attempted(run, attempt, extra_s)

    async def _attempted(self, run: _Run, attempt: Callable[[Attempt], Awaitable[T]], extra_s: float) -> T:
        admission = await self.gate.admit()
        run.attempts += 1
        run.excused = False
        started_s = self._clock()
        outcome = Outcome.NEUTRAL
        with self._lateness.watched() as lost_s:
            try:
                async with asyncio.timeout(self.policy.attempt_timeout_s + extra_s) as limit:
                    state = Attempt(
                        number=run.attempts,
                        ambiguous=run.ambiguous,
                        probe=admission.is_probe,
                        allowed_s=extra_s,
                        _throughput_min_bytes_per_s=self.policy.throughput_min_bytes_per_s,
                        _scopes=(limit, run.deadline),
                    )
                    result = await attempt(state)
                outcome = self._answered(state, started_s)
                return result
            except TimeoutError as error:
                if not limit.expired():
                    raise
                outcome = self._timed_out(run, admission, started_s, lost_s())
                raise TransientFaultError("timeout", timed_out=True) from error
            except asyncio.CancelledError:
                # Our own deadline cuts an attempt by cancelling it; it is not the caller's wish then.
                if run.deadline.expired() or is_cut():
                    outcome = self._timed_out(run, admission, started_s, lost_s())
                raise
            except TransientFaultError as fault:
                if fault.timed_out:
                    outcome = self._timed_out(run, admission, started_s, lost_s())
                elif fault.counts:
                    outcome = Outcome.FAILURE
                if fault.reason == THROTTLED:
                    self._window.overloaded(started_s)
                raise
            except StorageError:
                # The backend answered, if only to refuse.
                outcome = self._answered(state, started_s)
                raise
            finally:
                admission.settle(outcome)
                self._counters.add(ATTEMPTS, operation=run.operation, outcome=outcome)

    def _answered(self, state: Attempt, started_s: float) -> Outcome:
        if not state.observed:
            return Outcome.NEUTRAL
        self._answered_at_s = self._clock()
        self._window.answered(started_s, state.allowed_s)
        return Outcome.SUCCESS

    def _timed_out(self, run: _Run, admission: Admission, started_s: float, lost_s: float) -> Outcome:
        """What a timeout says of the backend. A probe's always counts: there is nothing else to go by."""
        self._window.overloaded(started_s)
        was_answered = self._answered_at_s > started_s
        was_late = lost_s >= max(LOST_S_MIN, LOST_SHARE_MIN * (self._clock() - started_s))
        run.excused = (was_answered or was_late) and not admission.is_probe
        return Outcome.NEUTRAL if run.excused else Outcome.FAILURE

    def _may_retry(self, run: _Run, error: BaseException) -> bool:
        if not isinstance(error, TransientFaultError):
            return False
        run.ambiguous = True
        if run.attempts >= self.policy.attempts_max:
            return False
        run.taken = self._budget.take(timed_out=error.timed_out and not run.excused)
        if run.taken:
            self._counters.add(RETRIES, operation=run.operation, reason=error.reason)
        logger.info(
            "storage attempt failed",
            extra={"operation": run.operation, "attempt": run.attempts, "reason": error.reason, "retry": run.taken > 0},
        )
        return run.taken > 0

    def _last_word(self, run: _Run, fault: TransientFaultError, total_s: float) -> StorageError:
        if fault.final is not None:
            return fault.final
        if fault.timed_out:
            return StorageTimeout(run.operation, total_s)
        return StorageFailed(run.operation, run.attempts, fault.reason)
