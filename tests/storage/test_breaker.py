from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from storage.breaker import BreakerMode, BreakerOpenError, BreakerState, CircuitBreaker, Outcome, Permit

THRESHOLD, RECOVERY_S, PROBE_TIMEOUT_S = 3, 60.0, 20.0


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def breaker(clock: Clock) -> CircuitBreaker:
    return CircuitBreaker(THRESHOLD, RECOVERY_S, PROBE_TIMEOUT_S, clock=clock)


def open_it(breaker: CircuitBreaker) -> None:
    for _ in range(THRESHOLD):
        breaker.settle(breaker.admit(), Outcome.FAILURE)


def test_it_opens_at_the_threshold_and_says_when_to_come_back(breaker: CircuitBreaker, clock: Clock) -> None:
    open_it(breaker)
    clock.now += 15

    with pytest.raises(BreakerOpenError) as rejected:
        breaker.admit()

    assert rejected.value.retry_after_s == 45
    assert breaker.snapshot().state is BreakerState.OPEN


def test_a_success_in_between_starts_the_count_again(breaker: CircuitBreaker) -> None:
    for outcome in [Outcome.FAILURE, Outcome.FAILURE, Outcome.SUCCESS, Outcome.FAILURE, Outcome.FAILURE]:
        breaker.settle(breaker.admit(), outcome)

    assert breaker.snapshot().state is BreakerState.CLOSED


def test_a_neutral_outcome_changes_no_count(breaker: CircuitBreaker) -> None:
    for outcome in [Outcome.FAILURE, Outcome.FAILURE, Outcome.NEUTRAL, Outcome.FAILURE]:
        breaker.settle(breaker.admit(), outcome)

    assert breaker.snapshot().state is BreakerState.OPEN


def test_of_twenty_waiting_at_half_open_exactly_one_gets_through(breaker: CircuitBreaker, clock: Clock) -> None:
    open_it(breaker)
    clock.now += RECOVERY_S
    admitted = 0
    for _ in range(20):
        try:
            breaker.admit()
        except BreakerOpenError:
            continue
        admitted += 1

    assert admitted == 1


def test_while_a_probe_is_under_way_others_are_told_to_ask_again_soon_and_still_rejected(
    breaker: CircuitBreaker, clock: Clock
) -> None:
    open_it(breaker)
    clock.now += RECOVERY_S
    probe = breaker.admit()

    for _ in range(3):
        with pytest.raises(BreakerOpenError) as rejected:
            breaker.admit()
        assert rejected.value.retry_after_s == 1.0
        clock.now += 1.0

    breaker.settle(probe, Outcome.SUCCESS)
    breaker.admit()


def test_the_probes_success_closes_it(breaker: CircuitBreaker, clock: Clock) -> None:
    open_it(breaker)
    clock.now += RECOVERY_S

    breaker.settle(breaker.admit(), Outcome.SUCCESS)

    assert breaker.snapshot().state is BreakerState.CLOSED
    assert breaker.snapshot().consecutive_failures == 0


def test_the_probes_failure_opens_it_for_the_full_time_again(breaker: CircuitBreaker, clock: Clock) -> None:
    open_it(breaker)
    clock.now += RECOVERY_S

    breaker.settle(breaker.admit(), Outcome.FAILURE)

    assert breaker.snapshot().state is BreakerState.OPEN
    assert breaker.snapshot().retry_after_s == RECOVERY_S


def test_a_cancelled_probe_frees_its_place(breaker: CircuitBreaker, clock: Clock) -> None:
    open_it(breaker)
    clock.now += RECOVERY_S

    breaker.settle(breaker.admit(), Outcome.NEUTRAL)

    assert breaker.admit().probe is not None


def test_a_hung_probe_expires_and_its_late_result_is_ignored(breaker: CircuitBreaker, clock: Clock) -> None:
    open_it(breaker)
    clock.now += RECOVERY_S
    hung = breaker.admit()
    clock.now += PROBE_TIMEOUT_S
    second = breaker.admit()

    breaker.settle(hung, Outcome.SUCCESS)

    assert breaker.snapshot().state is BreakerState.HALF_OPEN
    breaker.settle(second, Outcome.SUCCESS)
    assert breaker.snapshot().state is BreakerState.CLOSED


def test_a_result_from_an_older_generation_is_ignored(breaker: CircuitBreaker, clock: Clock) -> None:
    slow = breaker.admit()
    open_it(breaker)
    clock.now += RECOVERY_S
    breaker.settle(breaker.admit(), Outcome.SUCCESS)

    breaker.settle(slow, Outcome.FAILURE)

    assert breaker.snapshot().consecutive_failures == 0


class BreakerMachine(RuleBasedStateMachine):
    """Against a model written from the sentences of the design, with the history of permits instead of counters."""

    permits = Bundle("permits")
    settled_probes = Bundle("settled_probes")

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.breaker = CircuitBreaker(THRESHOLD, RECOVERY_S, PROBE_TIMEOUT_S, clock=self.clock)
        self.failures = 0
        self.era = 0
        self.opened_at: float | None = None
        self.probe: tuple[Permit, float] | None = None
        self.mode = BreakerMode.AUTOMATIC

    @rule(seconds=st.sampled_from([0.5, PROBE_TIMEOUT_S - 0.5, PROBE_TIMEOUT_S, RECOVERY_S - 1, RECOVERY_S]))
    def time_passes(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule(target=permits)
    def call(self) -> object:
        admits = self.opened_at is None or (
            self.clock.now - self.opened_at >= RECOVERY_S
            and (self.probe is None or self.clock.now - self.probe[1] >= PROBE_TIMEOUT_S)
        )
        admits = admits and self.mode is not BreakerMode.FORCED_OPEN
        try:
            permit = self.breaker.admit()
        except BreakerOpenError:
            assert not admits
            assert self.breaker.snapshot().retry_after_s > 0
            return multiple()
        assert admits
        assert (permit.probe is not None) == (self.opened_at is not None)
        if self.opened_at is not None:
            self.probe = (permit, self.clock.now)
        return (permit, self.era)

    @rule(target=settled_probes, given=consumes(permits), outcome=st.sampled_from(Outcome))
    def settle(self, given: tuple[Permit, int], outcome: Outcome) -> object:
        permit, era = given
        self.breaker.settle(permit, outcome)
        self._settle_in_model(permit, era, outcome)
        return multiple() if permit.probe is None else permit

    @rule(permit=settled_probes, outcome=st.sampled_from(Outcome))
    def settle_a_probe_again(self, permit: Permit, outcome: Outcome) -> None:
        """Changes nothing: a report that may not have arrived is sent again."""
        before = self.breaker.snapshot()
        self.breaker.settle(permit, outcome)
        assert self.breaker.snapshot() == before

    def _settle_in_model(self, permit: Permit, era: int, outcome: Outcome) -> None:
        if self.opened_at is not None:
            if self.probe is None or self.probe[0] is not permit:
                return
            self.probe = None
        elif era != self.era:
            return
        if outcome is Outcome.SUCCESS:
            self.failures = 0
            if self.opened_at is not None:
                self.opened_at, self.era = None, self.era + 1
        elif outcome is Outcome.FAILURE:
            self.failures += 1
            if self.mode is BreakerMode.FORCED_CLOSED:
                return
            if self.opened_at is not None or self.failures >= THRESHOLD:
                self.opened_at, self.era = self.clock.now, self.era + 1

    @rule(mode=st.sampled_from(BreakerMode))
    def force(self, mode: BreakerMode) -> None:
        self.breaker.force(mode)
        if mode is not self.mode:
            self.mode, self.failures, self.probe, self.era = mode, 0, None, self.era + 1
            self.opened_at = self.clock.now if mode is BreakerMode.FORCED_OPEN else None

    @invariant()
    def states_agree(self) -> None:
        state = self.breaker.snapshot().state
        assert (state is BreakerState.CLOSED) == (self.opened_at is None)
        if self.probe is not None:
            assert state is BreakerState.HALF_OPEN


BreakerMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40)
TestBreakerAgainstModel = BreakerMachine.TestCase
