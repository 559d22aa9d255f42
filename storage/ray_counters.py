"""Counts as Ray metrics, which every node exports to Prometheus."""

from __future__ import annotations

import atexit
import logging
import threading
from collections import defaultdict
from functools import cache
from typing import Any

from ray.util.metrics import Counter, Gauge

from storage.counters import CLEANUP_FAILURES, METRICS, UNVERIFIED_WEIGHTS, Tally

logger = logging.getLogger(__name__)

FLUSH_S = 1.0


class RayCounters(Tally):
    """Implements `Counters`. For processes that Ray runs in; also keeps the counts of this process.

    Ray hears of them together, every `FLUSH_S`: one by one they cost a tenth of a small storage operation.
    """

    def __init__(self) -> None:
        super().__init__()
        kinds: dict[str, Any] = {"counter": Counter, "gauge": Gauge}
        self._metrics = {
            name: kinds[metric.kind](name, description=metric.description, tag_keys=metric.labels)
            for name, metric in METRICS.items()
        }
        self._pending: defaultdict[tuple[str, tuple[tuple[str, str], ...]], float] = defaultdict(float)
        self._pending_lock = threading.Lock()
        atexit.register(self.flush)

    def add(self, metric: str, value: float = 1.0, **labels: str) -> None:
        super().add(metric, value, **labels)
        with self._pending_lock:
            if not self._pending:
                timer = threading.Timer(FLUSH_S, self.flush)
                timer.daemon = True
                timer.start()
            self._pending[metric, tuple(labels.items())] += value

    def show(self, metric: str, value: float, **labels: str) -> None:
        super().show(metric, value, **labels)
        self._metrics[metric].set(value, tags=labels)

    def flush(self) -> None:
        """Tell Ray what has been counted since the last time."""
        with self._pending_lock:
            pending, self._pending = self._pending, defaultdict(float)
        for (metric, labels), value in pending.items():
            if value > 0:
                # Ray refuses to add nothing.
                self._metrics[metric].inc(value, tags=dict(labels))


@cache
def of_this_process() -> RayCounters:
    """For code that is handed no counters."""
    return RayCounters()


def note_unverified_weights(kind: str, owner: str) -> None:
    """Weights are asked for of which no digest is known. `kind` of place, and `owner` as `keys.owner_of` says.

    Logged and counted.
    """
    logger.info("no SHA-256 was recorded of an adapter of %s", owner)
    of_this_process().add(UNVERIFIED_WEIGHTS, kind=kind)


def note_cleanup_failure(resource: str, reason: str) -> None:
    """Something that should be gone is still there. `resource`: what kind of thing; `reason`: an error's code or class.

    Logged and counted.
    """
    logger.warning("could not remove %s (%s)", resource, reason)
    of_this_process().add(CLEANUP_FAILURES, resource=resource)
