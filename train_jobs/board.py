"""What the driver and the workers of one training tell each other.

The driver holds the job's lease and alone writes its record; rank 0 reports here and learns here whether to stop.
"""

from __future__ import annotations

from typing import Any, Literal

# Stands in a report for the stage that waits for it.
WAITING = "waiting for storage"

StopReason = Literal["cancelled", "timed_out", "interrupted", "lease_lost"]


class RunBoard:
    """Plain; `run.py` makes a Ray actor of it. The first reason to stop stays."""

    def __init__(self) -> None:
        self._progress: dict[str, Any] = {}
        self._reports_total = 0
        self._stop_reason: StopReason | None = None
        self._waits = 0

    def report(self, progress: dict[str, Any]) -> StopReason | None:
        """From rank 0: where it is. Returns whether, and why, to stop."""
        self._progress = progress
        self._reports_total += 1
        return self._stop_reason

    def waiting(self, is_waiting: bool) -> None:
        """From whoever starts the workers: a call begins to wait for the object storage, or goes on."""
        self._waits += 1 if is_waiting else -1

    def latest(self) -> tuple[int, dict[str, Any]]:
        """Number of reports so far, and the last one. Before the first, a wait for the storage is what holds up the
        start; later the workers know better what the training does.
        """
        if self._reports_total == 0 and self._waits > 0:
            return 0, {"stage": WAITING}
        return self._reports_total, self._progress

    def ask_to_stop(self, reason: StopReason) -> None:
        """From the driver."""
        self._stop_reason = self._stop_reason or reason
