"""Counts as Ray metrics, which every node exports to Prometheus."""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

from ray.util.metrics import Counter, Gauge

from storage.counters import CLEANUP_FAILURES, METRICS, Tally

logger = logging.getLogger(__name__)


class RayCounters(Tally):
    """Implements `Counters`. For processes that Ray runs in; also keeps the counts of this process."""

    def __init__(self) -> None:
        super().__init__()
        kinds: dict[str, Any] = {"counter": Counter, "gauge": Gauge}
        self._metrics = {
            name: kinds[metric.kind](name, description=metric.description, tag_keys=metric.labels)
            for name, metric in METRICS.items()
        }

    def add(self, metric: str, value: float = 1.0, **labels: str) -> None:
        super().add(metric, value, **labels)
        if value > 0:
            # Ray refuses to add nothing.
            self._metrics[metric].inc(value, tags=labels)

    def show(self, metric: str, value: float, **labels: str) -> None:
        super().show(metric, value, **labels)
        self._metrics[metric].set(value, tags=labels)


@cache
def of_this_process() -> RayCounters:
    """For code that is handed no counters."""
    return RayCounters()


def note_cleanup_failure(resource: str, reason: str) -> None:
    """Something that should be gone is still there. `resource`: what kind of thing; `reason`: an error's code or class.

    Logged and counted.
    """
    logger.warning("could not remove %s (%s)", resource, reason)
    of_this_process().add(CLEANUP_FAILURES, resource=resource)
