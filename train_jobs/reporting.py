"""Where a worker says how far it is, and learns whether to stop."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Protocol

import ray

from train_jobs.board import WAITING, StopReason
from train_jobs.progress import ABSENT_WHERE_NONE, Progress

logger = logging.getLogger(__name__)

REPORT_INTERVAL_S = 1.0
# In a report: the step of the checkpoint that this attempt went on from, absent where it began at the beginning.
RESUMED_FROM = "resumed_from_step"
# In a report: the newest previews, each with the key of its picture.
PREVIEWS = "previews"
PREVIEWS_REPORTED_MAX = 16
# In a report: how many workers train now.
WORKERS_NOW = "workers"
# In a report: the keys of the stored loss history.
LOGS = "logs"
# In a report, and among a checkpoint's facts: the step with the lowest validation loss so far.
BEST_STEP = "best_step"
KEPT_IN_REPORTS = frozenset({RESUMED_FROM, PREVIEWS, WORKERS_NOW, LOGS})


class Reporter(Protocol):
    """Where a worker says how far it is, and learns whether to stop."""

    def stage(self, name: str, **details: Any) -> None: ...

    def progress(self, progress: Progress) -> None: ...

    def waiting(self, is_waiting: bool) -> None:
        """Whether the object storage holds up the work."""
        ...

    @property
    def stop_reason(self) -> StopReason | None: ...


class Quiet:
    """For ranks other than 0, which learn of a stop from rank 0 through the loop."""

    stop_reason: StopReason | None = None

    def stage(self, name: str, **details: Any) -> None:
        """Nobody is told."""

    def progress(self, progress: Progress) -> None:
        """Nobody is told."""

    def waiting(self, is_waiting: bool) -> None:
        """Nobody is told."""


class BoardReporter:
    """Tells the driver's board from a thread of its own, so that a slow driver slows no step.

    `exchange` sends a report and returns a reason to stop. A board that is dead went with its driver, and so did the
    work's purpose, which reads as "interrupted"; one that is only slow is asked again.
    """

    def __init__(
        self, exchange: Callable[[dict[str, Any]], StopReason | None], *, interval_s: float = REPORT_INTERVAL_S
    ) -> None:
        self._exchange = exchange
        self._interval_s = interval_s
        self._latest: dict[str, Any] = {"stage": "starting"}
        self._is_waiting = False
        self._ended = threading.Event()
        self.stop_reason: StopReason | None = None
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def start(self) -> BoardReporter:
        self._thread.start()
        return self

    def stage(self, name: str, **details: Any) -> None:
        numbers = {k: v for k, v in self._latest.items() if k not in {"stage", "done", "of"}}
        self._latest = numbers | {"stage": name, **details}

    def progress(self, progress: Progress) -> None:
        kept = {k: v for k, v in self._latest.items() if k in KEPT_IN_REPORTS}
        found = asdict(progress).items()
        numbers = {name: number for name, number in found if number is not None or name not in ABSENT_WHERE_NONE}
        self._latest = {"stage": "training", **numbers, **kept}

    def waiting(self, is_waiting: bool) -> None:
        self._is_waiting = is_waiting

    def close(self) -> None:
        """Send the last report and end the thread."""
        self._ended.set()
        self._thread.join(timeout=10.0)

    def _run(self) -> None:
        is_last = False
        while not is_last:
            is_last = self._ended.wait(self._interval_s)
            try:
                report = {**self._latest, "stage": WAITING} if self._is_waiting else self._latest
                self.stop_reason = self._exchange(report) or self.stop_reason
            except ray.exceptions.RayActorError:
                logger.warning("the training's driver is gone")
                self.stop_reason = self.stop_reason or "interrupted"
            except ray.exceptions.RayError as error:
                logger.warning("the training's driver does not answer: %s", type(error).__name__)
