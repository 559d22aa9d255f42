"""One breaker for the whole cluster, as one storage actor sees it. Plain: the Ray calls come in as a `Remote`.

Every attempt has to pass two breakers. The local one decides at once and alone. Of the shared one a copy of its
state decides, and outcomes are reported to it in the background, each report bringing the state back. It is asked
before the call only when it is due for a probe, so that the cluster sends one probe and not one for each node. When
it cannot be reached, the local breaker decides alone.

An operator's setting is known to the shared breaker and to every node. The newest wins, so a shared breaker that
started anew learns it from the first node that reports.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from storage.breaker import (
    BreakerMode,
    BreakerOpenError,
    BreakerSnapshot,
    BreakerState,
    CircuitBreaker,
    Outcome,
    Permit,
)
from storage.errors import StorageUnavailable

logger = logging.getLogger(__name__)

REPORTS_MAX = 1000
# A breaker actor that has to be started first takes seconds.
FORCE_TIMEOUT_S = 20.0


@dataclass(frozen=True)
class OperatorSetting:
    """`set_at`: seconds since 1970, only to tell the newer of two settings."""

    mode: BreakerMode = BreakerMode.AUTOMATIC
    set_at: float = 0.0


@dataclass(frozen=True)
class SharedState:
    """`epoch` changes when the shared breaker starts anew, and its generations with it."""

    epoch: str
    breaker: BreakerSnapshot
    setting: OperatorSetting = OperatorSetting()


@dataclass(frozen=True)
class SharedPermit:
    """Leave for one call by the shared breaker of `epoch`."""

    epoch: str
    permit: Permit


@dataclass(frozen=True)
class Report:
    permit: SharedPermit
    outcome: Outcome


class SharedBreaker:
    """One circuit breaker at which outcomes from everywhere arrive."""

    def __init__(self, breaker: CircuitBreaker, epoch: str) -> None:
        self._breaker = breaker
        self._epoch = epoch
        self._setting = OperatorSetting()

    def report(self, reports: Sequence[Report], setting: OperatorSetting | None = None) -> SharedState:
        """Outcomes that began under another epoch are dropped, as those of older generations are.

        `setting` is the newest one that the reporter knows of.
        """
        if setting is not None and setting.set_at > self._setting.set_at:
            self._setting = setting
            self._breaker.force(setting.mode)
        for report in reports:
            if report.permit.epoch == self._epoch:
                self._breaker.settle(report.permit.permit, report.outcome)
        return self._state()

    def admit(self) -> SharedPermit | SharedState:
        """A permit when a call may be made now, else the state that forbids it."""
        try:
            return SharedPermit(self._epoch, self._breaker.admit())
        except BreakerOpenError:
            return self._state()

    def _state(self) -> SharedState:
        return SharedState(self._epoch, self._breaker.snapshot(), self._setting)


class RemoteUnreachableError(Exception):
    """The shared breaker cannot be asked."""


class Remote(Protocol):
    """A `SharedBreaker` elsewhere. Both raise RemoteUnreachableError."""

    async def report(self, reports: Sequence[Report], setting: OperatorSetting | None = None) -> SharedState: ...

    async def admit(self) -> SharedPermit | SharedState: ...


class SharedGate:
    """Implements `storage.gate.Gate`. Belongs to one event loop, on which `run` has to run as a task.

    `timeout_s` bounds each call to the remote. `probe_timeout_s` is the lease of the shared breaker's probes.
    """

    def __init__(
        self,
        local: CircuitBreaker,
        remote: Remote,
        *,
        sync_interval_s: float,
        timeout_s: float = 2.0,
        probe_timeout_s: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._local = local
        self._remote = remote
        self._wall_clock = wall_clock
        self._setting = OperatorSetting()
        self._sync_interval_s = sync_interval_s
        self._timeout_s = timeout_s
        self._probe_timeout_s = probe_timeout_s
        self._clock = clock
        self._state: SharedState | None = None
        self._closed_until = 0.0
        self._reports: deque[Report] = deque(maxlen=REPORTS_MAX)
        self._urgent = asyncio.Event()
        # A task that nothing refers to may be collected before it ends.
        self._late_asks: set[asyncio.Task[SharedPermit | SharedState]] = set()

    async def admit(self) -> SharedAdmission:
        """Raises BreakerOpenError when either breaker is open.

        Cancelled while the shared breaker is asked, it gives back what that grants.
        """
        local = self._local.admit()
        try:
            shared = await self._admitted_by_shared()
        except BaseException:
            self._local.settle(local, Outcome.NEUTRAL)
            raise
        return SharedAdmission(self, local, shared)

    def snapshot(self) -> BreakerSnapshot:
        """Of the breaker that forbids calls for longer."""
        local = self._local.snapshot()
        if self._state is None or self._state.breaker.state is BreakerState.CLOSED:
            return local
        shared = replace(self._state.breaker, retry_after_s=max(0.0, self._closed_until - self._clock()))
        return max(shared, local, key=lambda snapshot: snapshot.retry_after_s)

    def settle(self, local: Permit, shared: SharedPermit | None, outcome: Outcome) -> None:
        """Tell the local breaker now, and the shared one soon."""
        self._local.settle(local, outcome)
        if shared is None:
            return
        report = Report(shared, outcome)
        repeats = outcome is Outcome.SUCCESS and self._reports and self._reports[-1] == report
        if not repeats:
            self._reports.append(report)
        if outcome is Outcome.FAILURE or shared.permit.probe is not None:
            self._urgent.set()
        if outcome is Outcome.SUCCESS and shared.permit.probe is not None:
            self._foresee_closed(shared)

    async def force(self, mode: BreakerMode) -> BreakerSnapshot:
        """Set the mode of the whole cluster. Raises StorageUnavailable where the shared breaker cannot be told."""
        # Later than what it replaces, also where this node's clock is behind.
        setting = OperatorSetting(mode, max(self._wall_clock(), self._setting.set_at + 0.001))
        try:
            async with asyncio.timeout(FORCE_TIMEOUT_S):
                self._apply(await self._remote.report([], setting))
        except (RemoteUnreachableError, TimeoutError) as error:
            raise StorageUnavailable("set_breaker", self._timeout_s) from error
        return self.snapshot()

    async def run(self) -> None:
        """Report and obey until cancelled."""
        while True:
            await self.sync()
            try:
                async with asyncio.timeout(self._sync_interval_s):
                    await self._urgent.wait()
            except TimeoutError:
                continue

    async def sync(self) -> None:
        """One report, and the state that comes back.

        Probes' outcomes stay until they have arrived: the whole cluster waits for them.
        """
        self._urgent.clear()
        reports = list(self._reports)
        self._reports.clear()
        try:
            async with asyncio.timeout(self._timeout_s):
                self._apply(await self._remote.report(reports, self._setting))
        except (RemoteUnreachableError, TimeoutError):
            # It may have arrived, and only its answer was lost. A probe's outcome counts once however often it comes;
            # any other call's would count again, so that one failure could open the breaker.
            self._reports.extendleft(report for report in reversed(reports) if report.permit.permit.probe is not None)
            self._lose_remote()

    async def _admitted_by_shared(self) -> SharedPermit | None:
        state = self._state
        if state is None:
            return None
        if state.breaker.state is BreakerState.CLOSED:
            return SharedPermit(state.epoch, Permit(state.breaker.generation))
        wait_s = self._closed_until - self._clock()
        if wait_s > 0:
            raise BreakerOpenError(wait_s)
        try:
            answer = await self._asked()
        except (RemoteUnreachableError, TimeoutError):
            self._lose_remote()
            return None
        if isinstance(answer, SharedPermit):
            return answer
        self._apply(answer)
        raise BreakerOpenError(answer.breaker.retry_after_s)

    async def _asked(self) -> SharedPermit | SharedState:
        """Raises RemoteUnreachableError, TimeoutError.

        The question outlives whoever asks it: an answer that nobody heard would keep the probe's place taken in the
        whole cluster until its lease has run out.
        """
        asking = asyncio.create_task(self._ask())
        try:
            async with asyncio.timeout(self._timeout_s):
                return await asyncio.shield(asking)
        except (asyncio.CancelledError, TimeoutError):
            self._late_asks.add(asking)
            asking.add_done_callback(self._give_back)
            raise

    async def _ask(self) -> SharedPermit | SharedState:
        """After the lease there is nothing left to give back."""
        async with asyncio.timeout(self._probe_timeout_s):
            return await self._remote.admit()

    def _give_back(self, asked: asyncio.Task[SharedPermit | SharedState]) -> None:
        self._late_asks.discard(asked)
        if asked.cancelled() or isinstance(asked.exception(), RemoteUnreachableError | TimeoutError):
            # No permit, or none that anybody here has heard of.
            return
        answer = asked.result()
        if isinstance(answer, SharedPermit):
            self._reports.append(Report(answer, Outcome.NEUTRAL))
            self._urgent.set()

    def _apply(self, state: SharedState) -> None:
        """Replies can overtake one another: an older generation of the same epoch is no news."""
        known = self._state
        if known is not None and known.epoch == state.epoch and state.breaker.generation < known.breaker.generation:
            return
        if known is None or known.breaker.state is not state.breaker.state:
            logger.info("the shared breaker is %s", state.breaker.state)
        self._state = state
        self._closed_until = self._clock() + state.breaker.retry_after_s
        if state.setting.set_at > self._setting.set_at:
            logger.warning("an operator set the breaker to %s", state.setting.mode)
            self._setting = state.setting
            self._local.force(state.setting.mode)

    def _foresee_closed(self, probe: SharedPermit) -> None:
        """What the shared breaker will say of our probe's success, without waiting to hear it."""
        closed = BreakerSnapshot(BreakerState.CLOSED, probe.permit.generation + 1, 0, 0.0)
        self._apply(SharedState(probe.epoch, closed, self._setting))

    def _lose_remote(self) -> None:
        if self._state is not None:
            logger.warning("the shared breaker cannot be reached, the local one decides alone")
        self._state = None


@dataclass(frozen=True)
class SharedAdmission:
    """Implements `storage.gate.Admission`. `shared` None: the shared breaker was not there to ask."""

    gate: SharedGate
    local: Permit
    shared: SharedPermit | None

    @property
    def is_probe(self) -> bool:
        return self.local.probe is not None or (self.shared is not None and self.shared.permit.probe is not None)

    def settle(self, outcome: Outcome) -> None:
        self.gate.settle(self.local, self.shared, outcome)
