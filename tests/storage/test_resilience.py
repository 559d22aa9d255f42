from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from storage.breaker import BreakerState, CircuitBreaker, Outcome
from storage.deadlines import within
from storage.errors import (
    IntegrityError,
    ObjectNotFound,
    StorageFailed,
    StorageTimeout,
    StorageUnavailable,
)
from storage.gate import LocalGate
from storage.resilience import Attempt, Policy, Resilience, RetryBudget, TransientFaultError

POLICY = Policy(
    attempts_max=4,
    attempt_timeout_s=30,
    deadline_s=120,
    backoff_initial_s=0.1,
    backoff_max_s=5,
    throughput_min_bytes_per_s=1024,
)


class Bench:
    """A resilience whose waits take no time, and a backend that follows a script."""

    def __init__(self, policy: Policy = POLICY, *, threshold: int = 100, budget: int = 500, slots: int = 8) -> None:
        self.now = 0.0
        self.waits_s: list[float] = []
        self.attempts: list[Attempt] = []
        self.breaker = CircuitBreaker(threshold, 60, 60, clock=lambda: self.now)
        self.resilience = Resilience(
            LocalGate(self.breaker), policy, RetryBudget(budget), max_concurrency=slots, sleep=self._sleep
        )

    async def _sleep(self, seconds: float) -> None:
        self.waits_s.append(seconds)

    def script(self, *results: object) -> Callable[[Attempt], Awaitable[object]]:
        remaining = list(results)

        async def attempt(state: Attempt) -> object:
            self.attempts.append(state)
            result = remaining.pop(0) if len(remaining) > 1 else remaining[0]
            if isinstance(result, BaseException):
                raise result
            return result

        return attempt

    @property
    def failures(self) -> int:
        return self.breaker.snapshot().consecutive_failures


def hang(cancelled: list[bool] | None = None) -> Callable[[Attempt], Awaitable[None]]:
    async def attempt(_: Attempt) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            if cancelled is not None:
                cancelled.append(True)
            raise

    return attempt


def short(**changes: float) -> Policy:
    return Policy(**{**vars(POLICY), **changes})  # type: ignore[arg-type]


async def test_a_transient_fault_is_retried_until_it_works() -> None:
    bench = Bench()

    result = await bench.resilience.call("get", bench.script(TransientFaultError("server_error"), "bytes"))

    assert result == "bytes"
    assert [attempt.number for attempt in bench.attempts] == [1, 2]


async def test_attempts_are_bounded_and_the_reason_is_kept() -> None:
    bench = Bench()

    with pytest.raises(StorageFailed) as failed:
        await bench.resilience.call("get", bench.script(TransientFaultError("server_error")))

    assert (failed.value.attempts, failed.value.reason) == (4, "server_error")
    assert len(bench.attempts) == 4


async def test_waits_have_full_jitter_within_a_doubling_bound() -> None:
    bench = Bench()
    for _ in range(20):
        with pytest.raises(StorageFailed):
            await bench.resilience.call("get", bench.script(TransientFaultError("server_error")))

    for number, bound_s in enumerate([0.1, 0.2, 0.4]):
        waits_s = bench.waits_s[number::3]
        assert all(0 <= wait_s <= bound_s for wait_s in waits_s)
        assert len(set(waits_s)) == len(waits_s)


async def test_only_listed_faults_are_retried() -> None:
    for error in [ObjectNotFound("k"), ValueError("a bug")]:
        bench = Bench()

        with pytest.raises(type(error)):
            await bench.resilience.call("get", bench.script(error))

        assert len(bench.attempts) == 1


async def test_an_answer_that_refuses_counts_as_success_of_the_backend() -> None:
    bench = Bench()
    bench.breaker.settle(bench.breaker.admit(), Outcome.FAILURE)

    with pytest.raises(ObjectNotFound):
        await bench.resilience.call("get", bench.script(ObjectNotFound("k")))

    assert bench.failures == 0


async def test_a_programming_error_says_nothing_about_the_backend() -> None:
    bench = Bench()
    bench.breaker.settle(bench.breaker.admit(), Outcome.FAILURE)

    with pytest.raises(KeyError):
        await bench.resilience.call("get", bench.script(KeyError("oops")))

    assert bench.failures == 1


async def test_a_fault_that_does_not_count_leaves_the_breaker_alone() -> None:
    bench = Bench()

    with pytest.raises(StorageFailed):
        await bench.resilience.call("put", bench.script(TransientFaultError("conflict", counts=False)))

    assert len(bench.attempts) == 4
    assert bench.failures == 0


async def test_a_fault_may_bring_its_own_last_word() -> None:
    bench = Bench()
    fault = TransientFaultError("corrupted", final=IntegrityError("k", "a", "b"))

    with pytest.raises(IntegrityError):
        await bench.resilience.call("get", bench.script(fault))


async def test_on_a_dead_backend_twenty_operations_make_five_calls() -> None:
    bench = Bench(threshold=5)
    dead = bench.script(TransientFaultError("connection"))

    results = []
    for _ in range(20):
        with pytest.raises((StorageFailed, StorageUnavailable)) as failed:
            await bench.resilience.call("get", dead)
        results.append((failed.type, failed.value.attempts))

    assert len(bench.attempts) == 5
    # The second call was tried once, and the breaker opened before its retry.
    assert results == [(StorageFailed, 4), (StorageUnavailable, 1)] + [(StorageUnavailable, 0)] * 18


async def test_an_open_breaker_rejects_without_calling_and_is_not_retried() -> None:
    bench = Bench(threshold=1)
    bench.breaker.settle(bench.breaker.admit(), Outcome.FAILURE)
    bench.now += 20

    with pytest.raises(StorageUnavailable) as rejected:
        await bench.resilience.call("get", bench.script("bytes"))

    assert (rejected.value.retry_after_s, rejected.value.attempts) == (40, 0)
    assert bench.attempts == []
    assert bench.waits_s == []


async def test_a_hung_attempt_is_cut_counted_and_retried() -> None:
    bench = Bench(short(attempt_timeout_s=0.01, attempts_max=2))
    cancelled: list[bool] = []

    with pytest.raises(StorageTimeout):
        await bench.resilience.call("get", hang(cancelled))

    assert cancelled == [True, True]
    assert bench.failures == 2


async def test_the_deadline_cuts_everything_and_counts_as_a_failure() -> None:
    bench = Bench(short(deadline_s=0.01))

    with pytest.raises(StorageTimeout) as timed_out:
        await bench.resilience.call("get", hang())

    assert timed_out.value.deadline_s == 0.01
    assert bench.failures == 1


async def test_a_deadline_of_the_call_replaces_the_policys() -> None:
    bench = Bench()

    with pytest.raises(StorageTimeout):
        await bench.resilience.call("health", hang(), deadline_s=0.01)


async def test_the_deadline_covers_the_waits() -> None:
    policy = short(deadline_s=0.02, backoff_initial_s=3600, backoff_max_s=3600)
    resilience = Resilience(LocalGate(Bench().breaker), policy, RetryBudget(500), max_concurrency=1)

    with pytest.raises(StorageTimeout):
        await resilience.call("get", Bench().script(TransientFaultError("server_error")))


async def test_cancellation_is_neutral_frees_the_probe_and_goes_through() -> None:
    bench = Bench(threshold=1)
    bench.breaker.settle(bench.breaker.admit(), Outcome.FAILURE)
    bench.now += 60
    task = asyncio.create_task(bench.resilience.call("get", hang()))
    await asyncio.sleep(0)

    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert bench.breaker.snapshot().state is BreakerState.HALF_OPEN
    assert await bench.resilience.call("get", bench.script("bytes")) == "bytes"
    assert bench.breaker.snapshot().state is BreakerState.CLOSED


async def test_a_success_without_a_call_does_not_forget_failures() -> None:
    bench = Bench()
    bench.breaker.settle(bench.breaker.admit(), Outcome.FAILURE)

    async def sign(state: Attempt) -> str:
        state.made_no_call()
        return "url"

    assert await bench.resilience.call("presign_get", sign) == "url"
    assert bench.failures == 1


async def test_an_attempt_knows_that_an_earlier_one_may_have_had_its_effect() -> None:
    bench = Bench()

    await bench.resilience.call("put", bench.script(TransientFaultError("timeout", timed_out=True), "done"))

    assert [attempt.ambiguous for attempt in bench.attempts] == [False, True]


async def test_the_budget_ends_retries_for_everybody() -> None:
    bench = Bench(budget=3 * RetryBudget.RETRY_COST)
    for _ in range(5):
        with pytest.raises(StorageFailed):
            await bench.resilience.call("get", bench.script(TransientFaultError("server_error")))

    assert len(bench.attempts) == 4 + 4 * 1


async def test_a_success_pays_back_what_its_retry_cost() -> None:
    bench = Bench(budget=RetryBudget.TIMEOUT_COST)
    timed_out = TransientFaultError("timeout", timed_out=True)
    for _ in range(3):
        await bench.resilience.call("get", bench.script(timed_out, "bytes"))

    assert len(bench.attempts) == 6


async def test_bytes_extend_the_time_that_is_allowed() -> None:
    bench = Bench(short(attempt_timeout_s=0.01, deadline_s=0.01, attempts_max=1))

    async def slow(state: Attempt) -> str:
        state.allow_for(3600 * 1024)
        await asyncio.sleep(0.03)
        return "bytes"

    assert await bench.resilience.call("get", slow) == "bytes"


async def test_no_more_run_at_once_than_there_are_slots_but_health_does_not_queue() -> None:
    bench = Bench(slots=2)
    release = asyncio.Event()
    running = 0

    async def attempt(_: Attempt) -> None:
        nonlocal running
        running += 1
        await release.wait()

    tasks = [asyncio.create_task(bench.resilience.call("get", attempt)) for _ in range(5)]
    for _ in range(5):
        await asyncio.sleep(0)

    assert running == 2
    assert await bench.resilience.call("health", bench.script("fine"), needs_place=False) == "fine"
    release.set()
    await asyncio.gather(*tasks)
    assert running == 5


async def test_a_wait_of_our_own_costs_an_attempt_no_time_but_the_deadline_goes_on() -> None:
    bench = Bench(short(attempt_timeout_s=0.05, deadline_s=0.3))

    async def waits(state: Attempt, *, for_s: float) -> str:
        async with state.standing_still():
            await asyncio.sleep(for_s)
        return "done"

    assert await bench.resilience.call("get", lambda state: waits(state, for_s=0.1)) == "done"
    with pytest.raises(StorageTimeout):
        await bench.resilience.call("get", lambda state: waits(state, for_s=10))


async def test_an_attempt_that_the_deadline_of_a_whole_operation_cuts_counts_as_a_failure() -> None:
    bench = Bench()

    with pytest.raises(StorageTimeout) as timed_out:
        async with within("list", 0.01):
            await bench.resilience.call("list", hang())

    assert (timed_out.value.operation, timed_out.value.deadline_s) == ("list", 0.01)
    assert bench.failures == 1
