"""A client that is overloaded, or overloads its server, keeps both working. Time is simulated throughout."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from storage.breaker import BreakerState, CircuitBreaker
from storage.congestion import BEAT_S, FEWEST, FIRST, IDLE_S, Lateness, Window
from storage.errors import ObjectNotFound, StorageError, StorageTimeout, StorageUnavailable
from storage.gate import LocalGate
from storage.resilience import THROTTLED, Attempt, Policy, Resilience, RetryBudget, TransientFaultError

TIMEOUT_S = 10.0
POLICY = Policy(
    attempts_max=4,
    attempt_timeout_s=600,
    deadline_s=600,
    backoff_initial_s=0.1,
    backoff_max_s=5,
    throughput_min_bytes_per_s=1024,
)


class Clock:
    """Moving `now` alone is time in which the event loop stands still; in `advance` its timers fire."""

    def __init__(self) -> None:
        self.now = 0.0
        self._timers: list[tuple[float, Callable[[], None]]] = []

    def __call__(self) -> float:
        return self.now

    def later(self, delay_s: float, call: Callable[[], None]) -> None:
        self._timers.append((self.now + delay_s, call))

    def advance(self, seconds: float) -> None:
        self.now += seconds
        due = [call for when, call in self._timers if when <= self.now]
        self._timers = [(when, call) for when, call in self._timers if when > self.now]
        for call in due:
            call()


@pytest.fixture
def clock() -> Clock:
    return Clock()


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def at_once(_: float) -> None:
    return None


def resilience_of(clock: Clock, *, threshold: int = 5) -> tuple[Resilience, CircuitBreaker]:
    breaker = CircuitBreaker(threshold, 60, 60, clock=clock)
    resilience = Resilience(
        LocalGate(breaker),
        POLICY,
        RetryBudget(500),
        max_concurrency=64,
        sleep=at_once,
        clock=clock,
        lateness=Lateness(clock=clock, later=clock.later),
    )
    return resilience, breaker


class SharedServer:
    """Works on all its requests at the same speed, `per_s` of them a second together, as a busy machine does.

    A client gives a request up after TIMEOUT_S.
    """

    def __init__(self, clock: Clock, per_s: float) -> None:
        self.clock = clock
        self.most = 0
        self._per_s = per_s
        self._open: dict[asyncio.Future[None], tuple[float, float]] = {}

    async def serve(self, _: Attempt) -> None:
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._open[answer] = (self.clock.now, 0.0)
        self.most = max(self.most, len(self._open))
        try:
            await answer
        finally:
            self._open.pop(answer, None)

    async def work(self, calls: asyncio.Future[Any], *, tick_s: float = BEAT_S) -> None:
        """Until `calls` has ended."""
        while not calls.done():
            await settle()
            self.clock.advance(tick_s)
            share = self._per_s * tick_s / max(1, len(self._open))
            for answer, (since_s, done) in list(self._open.items()):
                self._open[answer] = (since_s, done + share)
                if answer.done():
                    continue
                if done + share >= 1.0 - 1e-9:
                    answer.set_result(None)
                elif self.clock.now - since_s >= TIMEOUT_S:
                    answer.set_exception(TransientFaultError("timeout", timed_out=True))


async def outcomes_of(server: SharedServer, resilience: Resilience, calls: int) -> list[object]:
    gathered = asyncio.gather(*(resilience.call("put", server.serve) for _ in range(calls)), return_exceptions=True)
    await server.work(gathered)
    return [result for result in gathered.result() if result is not None]


@pytest.mark.parametrize("per_s", [1.0, 2.0, 5.0, 50.0])
async def test_a_burst_on_a_slow_but_healthy_server_loses_nothing_and_leaves_the_breaker_closed(
    clock: Clock, per_s: float
) -> None:
    resilience, breaker = resilience_of(clock)
    server = SharedServer(clock, per_s)

    # All 64 at once would take 64 / per_s seconds each: longer than any of them is waited for where per_s is small.
    assert await outcomes_of(server, resilience, 300) == []
    assert breaker.snapshot().state is BreakerState.CLOSED


async def test_a_fast_server_soon_gets_as_many_at_once_as_are_allowed(clock: Clock) -> None:
    resilience, _ = resilience_of(clock)
    server = SharedServer(clock, 1000.0)

    assert await outcomes_of(server, resilience, 500) == []
    assert server.most == 64


async def test_a_burst_after_a_quiet_time_begins_carefully_again(clock: Clock) -> None:
    resilience, breaker = resilience_of(clock)
    assert await outcomes_of(SharedServer(clock, 1000.0), resilience, 500) == []
    clock.advance(IDLE_S)

    assert await outcomes_of(SharedServer(clock, 3.0), resilience, 300) == []
    assert breaker.snapshot().state is BreakerState.CLOSED


class SteadyServer(SharedServer):
    """Answers each request `delay_s` after it came, however many there are."""

    def __init__(self, clock: Clock, delay_s: float) -> None:
        super().__init__(clock, 0.0)
        self.delay_s = delay_s
        self.hits = 0

    async def serve(self, state: Attempt) -> None:
        self.hits += 1
        await super().serve(state)

    async def work(self, calls: asyncio.Future[Any], *, tick_s: float = BEAT_S) -> None:
        while not calls.done():
            await settle()
            self.clock.advance(tick_s)
            for answer, (since_s, _) in list(self._open.items()):
                waited_s = self.clock.now - since_s
                if answer.done():
                    continue
                if waited_s >= self.delay_s:
                    answer.set_result(None)
                elif waited_s >= TIMEOUT_S:
                    answer.set_exception(TransientFaultError("timeout", timed_out=True))


async def test_a_server_that_turns_slow_under_a_full_window_loses_nothing_while_it_answers_in_time(
    clock: Clock,
) -> None:
    resilience, breaker = resilience_of(clock)
    assert await outcomes_of(SharedServer(clock, 1000.0), resilience, 500) == []
    assert resilience._window.size == 64
    slow = SteadyServer(clock, delay_s=3.0)

    assert await outcomes_of(slow, resilience, 300) == []
    assert slow.hits == 300
    assert breaker.snapshot().state is BreakerState.CLOSED


async def test_a_server_that_turns_slower_than_its_timeout_under_a_full_window_is_hit_once_by_each_and_then_probed(
    clock: Clock,
) -> None:
    resilience, breaker = resilience_of(clock)
    assert await outcomes_of(SharedServer(clock, 1000.0), resilience, 500) == []
    slow = SteadyServer(clock, delay_s=2 * TIMEOUT_S)
    began_s = clock.now

    errors = await outcomes_of(slow, resilience, 300)

    # The attempts that were under way together are all that the server feels, and nobody waits for a second one.
    # Those for whose retry the budget has nothing left say that they timed out.
    assert slow.hits == 64
    assert {type(error) for error in errors} <= {StorageTimeout, StorageUnavailable}
    assert len(errors) == 300
    assert breaker.snapshot().state is BreakerState.OPEN
    assert clock.now - began_s <= 2 * TIMEOUT_S

    clock.advance(60.0)
    assert len(await outcomes_of(slow, resilience, 20)) == 20
    assert slow.hits == 65
    clock.advance(60.0)
    slow.delay_s = 1.0
    assert len(await outcomes_of(slow, resilience, 20)) < 20
    assert breaker.snapshot().state is BreakerState.CLOSED


async def test_a_server_that_has_died_still_opens_the_breaker(clock: Clock) -> None:
    resilience, breaker = resilience_of(clock)
    assert await outcomes_of(SharedServer(clock, 1000.0), resilience, 100) == []

    errors = await outcomes_of(SharedServer(clock, 0.0), resilience, 300)

    assert breaker.snapshot().state is BreakerState.OPEN
    assert {type(error) for error in errors} <= {StorageTimeout, StorageUnavailable}
    assert len(errors) == 300


def faulty(clock: Clock, after_s: float) -> Callable[[Attempt], object]:
    """Times out then, without a turn of the event loop."""

    async def attempt(_: Attempt) -> None:
        clock.now += after_s
        raise TransientFaultError("timeout", timed_out=True)

    return attempt


async def test_timeouts_of_a_process_that_stood_still_are_not_held_against_the_backend(clock: Clock) -> None:
    resilience, breaker = resilience_of(clock)

    for _ in range(3):
        with pytest.raises(StorageError):
            await resilience.call("get", faulty(clock, 20.0))  # type: ignore[arg-type]

    assert breaker.snapshot().consecutive_failures == 0


async def test_a_timeout_after_another_answer_says_nothing_and_one_before_it_does(clock: Clock) -> None:
    resilience, breaker = resilience_of(clock)
    lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def waiting(state: Attempt) -> None:
        if state.number > 1:
            raise ObjectNotFound("k")
        await lost

    async def answer(_: Attempt) -> None:
        return None

    call = asyncio.create_task(resilience.call("get", waiting))
    await settle()
    clock.advance(BEAT_S / 2)
    await resilience.call("head", answer)
    lost.set_exception(TransientFaultError("timeout", timed_out=True))
    await asyncio.wait([call])
    assert isinstance(call.exception(), ObjectNotFound)
    assert breaker.snapshot().consecutive_failures == 0

    clock.advance(1.0)
    with pytest.raises(StorageTimeout):
        await resilience.call("get", faulty(clock, 0.0))  # type: ignore[arg-type]
    assert breaker.snapshot().consecutive_failures == POLICY.attempts_max


async def test_a_probe_that_times_out_opens_the_breaker_again_whatever_the_reason(clock: Clock) -> None:
    resilience, breaker = resilience_of(clock, threshold=1)
    with pytest.raises(StorageUnavailable):
        await resilience.call("get", faulty(clock, 0.0))  # type: ignore[arg-type]
    clock.advance(60.0)
    with pytest.raises(StorageUnavailable):
        await resilience.call("get", faulty(clock, 20.0))  # type: ignore[arg-type]

    assert breaker.snapshot().state is BreakerState.OPEN


async def filled(window: Window) -> list[asyncio.Task[None]]:
    async def hold() -> None:
        async with window.place():
            await asyncio.Event().wait()

    tasks = [asyncio.create_task(hold()) for _ in range(64)]
    await settle()
    return tasks


async def test_throttling_halves_the_window_once_for_attempts_that_ran_together(clock: Clock) -> None:
    resilience, _ = resilience_of(clock)

    async def throttled(state: Attempt) -> None:
        if state.number == 1:
            raise TransientFaultError(THROTTLED)

    await resilience.call("put", throttled)
    assert resilience._window.size == FIRST // 2

    window = Window(64, clock=clock)
    clock.now += 1.0
    for _ in range(8):
        window.overloaded(started_s=0.5)
    assert window.size == FIRST // 2


async def test_the_window_doubles_while_all_goes_well_and_after_a_fault_grows_by_one_a_round(clock: Clock) -> None:
    window = Window(64, clock=clock)
    tasks = await filled(window)
    for _ in range(8):
        window.answered(clock.now, 0.0)
        await settle()
    assert window.size == 16
    window.overloaded(clock.now)
    assert window.size == 8
    for _ in range(8):
        window.answered(clock.now, 0.0)
    assert 8 <= window.size <= 9
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_window_that_nobody_waits_for_does_not_grow_and_never_closes(clock: Clock) -> None:
    window = Window(64, clock=clock)
    for _ in range(100):
        window.answered(clock.now, 0.0)
    assert window.size == FIRST
    for _ in range(100):
        clock.now += 1.0
        window.overloaded(clock.now)
    assert window.size == FEWEST


async def test_a_late_answer_shrinks_the_window_unless_many_bytes_explain_it(clock: Clock) -> None:
    window = Window(64, clock=clock)
    clock.advance(60.0)
    window.answered(started_s=0.0, allowed_s=60.0)
    assert window.size == FIRST
    window.answered(started_s=0.0, allowed_s=1.0)
    assert window.size == FIRST // 2


async def test_lateness_counts_only_what_was_lost_while_somebody_watched(clock: Clock) -> None:
    lateness = Lateness(clock=clock, later=clock.later)
    with lateness.watched() as lost_s:
        clock.now += BEAT_S
        assert lost_s() == 0.0
        clock.now += 3.0
        assert lost_s() == pytest.approx(3.0)
        with lateness.watched() as later_s:
            assert later_s() == 0.0
        clock.advance(0.0)
        assert lost_s() == pytest.approx(3.0)
        for _ in range(4):
            clock.advance(BEAT_S)
        assert lost_s() == pytest.approx(3.0)
    clock.now += 5.0
    clock.advance(0.0)
    with lateness.watched() as lost_s:
        clock.advance(BEAT_S)
        assert lost_s() == 0.0
