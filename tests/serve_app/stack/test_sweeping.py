from __future__ import annotations

import pytest

from serve_app.stack.sweeping import PeriodicSweeps
from storage.counters import CLEANUP_FAILURES, Tally
from storage.errors import StorageUnavailable
from storage.sweep_report import SweepReport


class EndedError(Exception):
    """Ends a loop that has no end of its own."""


async def test_sweeps_go_on_after_one_that_fails_and_the_failures_are_counted() -> None:
    tally, waits_s, results = Tally(), [], [StorageUnavailable("list", 60), KeyError("a bug"), None]

    async def sweep() -> SweepReport:
        result = results.pop(0)
        if result is not None:
            raise result
        return SweepReport(False, (), (), 0)

    async def sleep(seconds: float) -> None:
        waits_s.append(seconds)
        if not results:
            raise EndedError

    with pytest.raises(EndedError):
        await PeriodicSweeps(sweep, 3600, tally, sleep=sleep).run()

    assert waits_s == [3600] * 4
    assert tally.counts()[CLEANUP_FAILURES] == {"sweep": 2}


def test_stopping_ends_a_wait_at_once() -> None:
    async def sweep() -> SweepReport:
        raise AssertionError("nobody waits that long")

    sweeps = PeriodicSweeps(sweep, 3600, Tally())
    sweeps.start()
    sweeps.stop()
