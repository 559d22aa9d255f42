"""Leave to make an attempt, as `storage.resilience` asks for it: of this process's breaker, or of the cluster's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from storage.breaker import BreakerMode, BreakerSnapshot, CircuitBreaker, Outcome, Permit


class Admission(Protocol):
    """Leave for one attempt. Settled once."""

    @property
    def is_probe(self) -> bool:
        """Whether this attempt decides if the breaker closes."""
        ...

    def settle(self, outcome: Outcome) -> None: ...


class Gate(Protocol):
    """Who decides whether an attempt may be made, and hears how it went. Nothing is held while it runs."""

    async def admit(self) -> Admission:
        """Raises BreakerOpenError."""
        ...

    def snapshot(self) -> BreakerSnapshot: ...

    async def force(self, mode: BreakerMode) -> BreakerSnapshot:
        """An operator's setting. Raises StorageUnavailable where it cannot be made known."""
        ...


class LocalGate:
    """The breaker of this process alone."""

    def __init__(self, breaker: CircuitBreaker) -> None:
        self._breaker = breaker

    async def admit(self) -> LocalAdmission:
        return LocalAdmission(self._breaker, self._breaker.admit())

    def snapshot(self) -> BreakerSnapshot:
        return self._breaker.snapshot()

    async def force(self, mode: BreakerMode) -> BreakerSnapshot:
        self._breaker.force(mode)
        return self._breaker.snapshot()


@dataclass(frozen=True)
class LocalAdmission:
    """Implements `Admission`."""

    breaker: CircuitBreaker
    permit: Permit

    @property
    def is_probe(self) -> bool:
        return self.permit.probe is not None

    def settle(self, outcome: Outcome) -> None:
        self.breaker.settle(self.permit, outcome)
