from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from storage.breaker import BreakerMode, BreakerOpenError, BreakerState, CircuitBreaker, Outcome
from storage.errors import StorageUnavailable
from storage.shared_breaker import (
    OperatorSetting,
    RemoteUnreachableError,
    Report,
    SharedAdmission,
    SharedBreaker,
    SharedGate,
    SharedPermit,
    SharedState,
)

THRESHOLD, RECOVERY_S, PROBE_TIMEOUT_S = 3, 60.0, 20.0


class Cluster:
    """A shared breaker and the way to it, which can be cut, and on which answers can be lost or kept waiting."""

    def __init__(self) -> None:
        self.now = 0.0
        self.reachable = True
        self.answers_reports = True
        self.answers_asks = asyncio.Event()
        self.answers_asks.set()
        self.admissions_asked = 0
        self.shared = SharedBreaker(self.breaker(), "first")

    def breaker(self) -> CircuitBreaker:
        return CircuitBreaker(THRESHOLD, RECOVERY_S, PROBE_TIMEOUT_S, clock=lambda: self.now)

    def gate(self, *, sync_interval_s: float = 1, timeout_s: float = 2) -> SharedGate:
        return SharedGate(
            self.breaker(),
            self,
            sync_interval_s=sync_interval_s,
            timeout_s=timeout_s,
            clock=lambda: self.now,
            wall_clock=lambda: 1e9 + self.now,
        )

    async def report(self, reports: Sequence[Report], setting: OperatorSetting | None = None) -> SharedState:
        self._check()
        state = self.shared.report(reports, setting)
        if not self.answers_reports:
            raise RemoteUnreachableError
        return state

    async def admit(self) -> SharedPermit | SharedState:
        self._check()
        self.admissions_asked += 1
        answer = self.shared.admit()
        await self.answers_asks.wait()
        return answer

    def _check(self) -> None:
        if not self.reachable:
            raise RemoteUnreachableError


@pytest.fixture
def cluster() -> Cluster:
    return Cluster()


async def passes() -> None:
    """What is ready on the event loop has its turn."""
    for _ in range(10):
        await asyncio.sleep(0)


async def fail(gate: SharedGate, times: int) -> None:
    for _ in range(times):
        (await gate.admit()).settle(Outcome.FAILURE)


async def open_everywhere(cluster: Cluster, *gates: SharedGate) -> None:
    for gate in gates:
        await gate.sync()
    await fail(gates[0], THRESHOLD)
    for gate in gates:
        await gate.sync()


async def test_a_node_obeys_what_other_nodes_found_out(cluster: Cluster) -> None:
    one, other = cluster.gate(), cluster.gate()

    await open_everywhere(cluster, one, other)

    with pytest.raises(BreakerOpenError) as rejected:
        await other.admit()
    assert rejected.value.retry_after_s == RECOVERY_S
    assert other.snapshot().state is BreakerState.OPEN


async def test_failures_of_several_nodes_add_up(cluster: Cluster) -> None:
    one, other = cluster.gate(), cluster.gate()
    await one.sync()
    await other.sync()
    await fail(one, 2)
    await fail(other, 1)

    await one.sync()
    await other.sync()

    with pytest.raises(BreakerOpenError):
        await other.admit()


async def test_of_many_nodes_exactly_one_probes(cluster: Cluster) -> None:
    gates = [cluster.gate() for _ in range(20)]
    await open_everywhere(cluster, *gates)
    cluster.now += RECOVERY_S

    results = await asyncio.gather(*(gate.admit() for gate in gates), return_exceptions=True)

    admitted = [result for result in results if not isinstance(result, BreakerOpenError)]
    assert len(admitted) == 1


async def test_after_its_probe_succeeded_a_node_goes_on_at_once_and_the_others_after_a_sync(cluster: Cluster) -> None:
    one, other = cluster.gate(), cluster.gate()
    await open_everywhere(cluster, one, other)
    cluster.now += RECOVERY_S
    probe = await one.admit()
    with pytest.raises(BreakerOpenError):
        await other.admit()

    probe.settle(Outcome.SUCCESS)

    assert probe.is_probe
    assert not (await one.admit()).is_probe
    await one.sync()
    await other.sync()
    assert not (await other.admit()).is_probe


async def test_a_failed_probe_keeps_every_node_out(cluster: Cluster) -> None:
    one, other = cluster.gate(), cluster.gate()
    await open_everywhere(cluster, one, other)
    cluster.now += RECOVERY_S

    (await one.admit()).settle(Outcome.FAILURE)
    await one.sync()
    await other.sync()

    for gate in (one, other):
        with pytest.raises(BreakerOpenError):
            await gate.admit()


async def test_a_cancelled_probe_leaves_its_place_to_another_node(cluster: Cluster) -> None:
    one, other = cluster.gate(), cluster.gate()
    await open_everywhere(cluster, one, other)
    cluster.now += RECOVERY_S

    (await one.admit()).settle(Outcome.NEUTRAL)
    await one.sync()

    assert (await other.admit()).is_probe


async def test_who_is_cancelled_while_it_asks_for_the_probe_leaves_it_to_another_node_at_once(
    cluster: Cluster,
) -> None:
    one, other = cluster.gate(sync_interval_s=3600), cluster.gate()
    await open_everywhere(cluster, one, other)
    reporting = asyncio.create_task(one.run())
    cluster.now += RECOVERY_S
    cluster.answers_asks.clear()
    asking = asyncio.create_task(one.admit())
    await passes()
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking

    cluster.answers_asks.set()
    await passes()

    assert (await other.admit()).is_probe
    reporting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reporting


async def test_a_probe_that_was_granted_too_late_is_left_to_another_node(cluster: Cluster) -> None:
    hasty, other = cluster.gate(timeout_s=0), cluster.gate()
    await open_everywhere(cluster, hasty, other)
    cluster.now += RECOVERY_S
    cluster.answers_asks.clear()
    alone = await hasty.admit()

    cluster.answers_asks.set()
    await passes()
    await hasty.sync()

    assert isinstance(alone, SharedAdmission)
    assert alone.shared is None
    assert (await other.admit()).is_probe


async def test_who_is_cancelled_while_it_asks_frees_no_place_of_anothers_probe(cluster: Cluster) -> None:
    gate = cluster.gate()
    await open_everywhere(cluster, gate)
    cluster.now += RECOVERY_S
    cluster.shared.admit()
    cluster.answers_asks.clear()
    asking = asyncio.create_task(gate.admit())
    await passes()
    asking.cancel()
    cluster.answers_asks.set()
    await passes()

    await gate.sync()

    with pytest.raises(BreakerOpenError):
        await gate.admit()


@pytest.mark.parametrize("outcome", Outcome)
@pytest.mark.parametrize("is_heard", [True, False])
async def test_a_probes_outcome_that_was_not_delivered_is_delivered_with_the_next_report(
    cluster: Cluster, outcome: Outcome, *, is_heard: bool
) -> None:
    one, other = cluster.gate(), cluster.gate()
    await open_everywhere(cluster, one, other)
    cluster.now += RECOVERY_S
    (await one.admit()).settle(outcome)
    cluster.reachable, cluster.answers_reports = is_heard, False
    await one.sync()
    cluster.reachable, cluster.answers_reports = True, True

    await one.sync()
    await other.sync()

    if outcome is Outcome.FAILURE:
        with pytest.raises(BreakerOpenError) as rejected:
            await other.admit()
        assert rejected.value.retry_after_s == RECOVERY_S
    else:
        assert (await other.admit()).is_probe == (outcome is Outcome.NEUTRAL)


async def test_a_failure_whose_report_was_not_answered_counts_once(cluster: Cluster) -> None:
    gate = cluster.gate()
    await gate.sync()
    await fail(gate, 1)
    cluster.answers_reports = False
    for _ in range(THRESHOLD):
        await gate.sync()
    cluster.answers_reports = True

    await gate.sync()

    assert cluster.shared.report([]).breaker.consecutive_failures == 1


async def test_without_the_shared_breaker_the_local_one_decides(cluster: Cluster) -> None:
    cluster.reachable = False
    gate = cluster.gate()
    await gate.sync()

    await fail(gate, THRESHOLD)

    with pytest.raises(BreakerOpenError):
        await gate.admit()
    cluster.now += RECOVERY_S
    assert (await gate.admit()).is_probe


async def test_a_shared_breaker_that_vanishes_while_open_locks_nobody_out(cluster: Cluster) -> None:
    one, other = cluster.gate(), cluster.gate()
    await open_everywhere(cluster, one, other)
    cluster.reachable = False

    await other.sync()

    assert not (await other.admit()).is_probe


async def test_a_node_that_wants_to_probe_and_reaches_nobody_probes_for_itself(cluster: Cluster) -> None:
    gate = cluster.gate()
    await open_everywhere(cluster, gate)
    cluster.now += RECOVERY_S
    cluster.reachable = False

    assert (await gate.admit()).is_probe


async def test_a_shared_breaker_that_started_anew_is_believed(cluster: Cluster) -> None:
    one, other = cluster.gate(), cluster.gate()
    await open_everywhere(cluster, one, other)
    cluster.shared = SharedBreaker(cluster.breaker(), "second")

    await other.sync()

    assert not (await other.admit()).is_probe


async def test_outcomes_from_before_a_new_start_are_dropped(cluster: Cluster) -> None:
    gate = cluster.gate()
    await gate.sync()
    await fail(gate, THRESHOLD)
    cluster.shared = SharedBreaker(cluster.breaker(), "second")

    await gate.sync()

    assert cluster.shared.report([]).breaker.state is BreakerState.CLOSED


async def test_a_closed_breaker_is_not_asked_before_a_call(cluster: Cluster) -> None:
    gate = cluster.gate()
    await gate.sync()

    for _ in range(10):
        (await gate.admit()).settle(Outcome.SUCCESS)

    assert cluster.admissions_asked == 0


async def test_failures_are_reported_without_waiting_for_the_interval(cluster: Cluster) -> None:
    gate = SharedGate(cluster.breaker(), cluster, sync_interval_s=3600, clock=lambda: cluster.now)
    reporting = asyncio.create_task(gate.run())
    await asyncio.sleep(0)
    await asyncio.sleep(0)

    await fail(gate, THRESHOLD)
    await passes()

    assert cluster.shared.report([]).breaker.state is BreakerState.OPEN
    reporting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reporting


async def is_admitted(gate: SharedGate) -> bool:
    try:
        (await gate.admit()).settle(Outcome.NEUTRAL)
    except BreakerOpenError:
        return False
    return True


async def test_an_operators_word_reaches_every_node(cluster: Cluster) -> None:
    one, other = cluster.gate(), cluster.gate()
    await other.sync()

    opened = await one.force(BreakerMode.FORCED_OPEN)
    await other.sync()
    cluster.now += 10 * RECOVERY_S

    assert (opened.state, opened.mode) == (BreakerState.OPEN, BreakerMode.FORCED_OPEN)
    assert (await is_admitted(one), await is_admitted(other)) == (False, False)
    await other.force(BreakerMode.AUTOMATIC)
    await one.sync()
    assert (await is_admitted(one), await is_admitted(other)) == (True, True)


async def test_forced_closed_no_failure_opens_a_breaker_and_automatic_starts_afresh(cluster: Cluster) -> None:
    gate = cluster.gate()
    await gate.force(BreakerMode.FORCED_CLOSED)

    await fail(gate, 10 * THRESHOLD)
    await gate.sync()
    assert await is_admitted(gate)

    await gate.force(BreakerMode.AUTOMATIC)
    await fail(gate, THRESHOLD - 1)
    await gate.sync()
    assert await is_admitted(gate)
    await fail(gate, 1)
    assert not await is_admitted(gate)


async def test_an_operators_word_outlives_the_shared_breaker(cluster: Cluster) -> None:
    one, other = cluster.gate(), cluster.gate()
    await one.force(BreakerMode.FORCED_OPEN)
    cluster.reachable = False
    await one.sync()
    assert not await is_admitted(one)

    cluster.shared = SharedBreaker(cluster.breaker(), "second")
    cluster.reachable = True
    await one.sync()
    await other.sync()

    assert not await is_admitted(other)


async def test_an_older_word_does_not_replace_a_newer_one(cluster: Cluster) -> None:
    one, late = cluster.gate(), cluster.gate()
    await late.force(BreakerMode.FORCED_OPEN)
    cluster.now += 1
    await one.force(BreakerMode.AUTOMATIC)

    await late.sync()
    await one.sync()

    assert (await is_admitted(one), await is_admitted(late)) == (True, True)


async def test_a_word_that_cannot_be_passed_on_is_refused(cluster: Cluster) -> None:
    gate = cluster.gate()
    await gate.sync()
    cluster.reachable = False

    with pytest.raises(StorageUnavailable):
        await gate.force(BreakerMode.FORCED_OPEN)
    assert await is_admitted(gate)
