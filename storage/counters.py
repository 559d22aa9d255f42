"""What storage counts, and where the counts go: injected, so that plain classes need no metrics library."""

from __future__ import annotations

import threading
from collections import defaultdict
from dataclasses import dataclass
from typing import Literal, Protocol

ATTEMPTS = "raylora_storage_attempts_total"
OPERATIONS = "raylora_storage_operations_total"
RETRIES = "raylora_storage_retries_total"
REQUESTS = "raylora_storage_requests_total"
BREAKER_STATE = "raylora_storage_breaker_state"
CLEANUP_FAILURES = "raylora_cleanup_failures_total"
TRACKING_FAILURES = "raylora_training_tracking_failures_total"
LOG_FAILURES = "raylora_training_log_failures_total"
UNVERIFIED_WEIGHTS = "raylora_unverified_weights_total"
WEBHOOK_FAILURES = "raylora_webhook_failures_total"
SWEPT_OBJECTS = "raylora_storage_swept_objects_total"
SWEPT_BYTES = "raylora_storage_swept_bytes_total"
# Looked at when counts are asked for: in a metric it would be what it was then.
HELD = "held"


@dataclass(frozen=True)
class Metric:
    """`labels` are given with every value, all of them."""

    kind: Literal["counter", "gauge"]
    description: str
    labels: tuple[str, ...] = ()


METRICS: dict[str, Metric] = {
    ATTEMPTS: Metric("counter", "Attempts on the backend, by what they told the breaker.", ("operation", "outcome")),
    OPERATIONS: Metric("counter", "Ended operations, by ok or their error's code.", ("operation", "result")),
    RETRIES: Metric("counter", "Attempts that were repeated, by why.", ("operation", "reason")),
    REQUESTS: Metric(
        "counter", "HTTP requests sent to the backend, by the operation they are part of.", ("operation", "method")
    ),
    BREAKER_STATE: Metric("gauge", "0 closed, 1 half-open, 2 open."),
    CLEANUP_FAILURES: Metric("counter", "Things that should be gone and could not be removed.", ("resource",)),
    TRACKING_FAILURES: Metric("counter", "Trainings whose numbers W&B did not get, by why.", ("reason",)),
    LOG_FAILURES: Metric("counter", "Loss histories of trainings that could not be stored, by why.", ("reason",)),
    UNVERIFIED_WEIGHTS: Metric(
        "counter",
        "Adapters asked for of which no SHA-256 was recorded, by their place.",
        ("kind",),
    ),
    WEBHOOK_FAILURES: Metric("counter", "Attempts at a webhook that failed, by why.", ("reason",)),
    SWEPT_OBJECTS: Metric("counter", "Things removed by the sweeper.", ("kind",)),
    SWEPT_BYTES: Metric("counter", "Bytes removed by the sweeper.", ("kind",)),
}

Counts = dict[str, dict[str, float]]
"""By metric, then by the labels' values joined with "," in the metric's order.

A store adds `HELD`: its `attempts` under way, the `part_bytes` that it keeps room for and the `read_bytes` of whole
objects; its actor adds the `request_bytes` that it holds for callers, its `connections` to them and all other `tasks`
of its event loop.
"""


class Counters(Protocol):
    """Safe to call from any thread; never raises for a metric of METRICS with its labels."""

    def add(self, metric: str, value: float = 1.0, **labels: str) -> None:
        """Count `value` more."""
        ...

    def show(self, metric: str, value: float, **labels: str) -> None:
        """Set a gauge."""
        ...


class Tally:
    """Implements `Counters` in memory."""

    def __init__(self) -> None:
        self._values: defaultdict[str, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
        self._lock = threading.Lock()

    def add(self, metric: str, value: float = 1.0, **labels: str) -> None:
        with self._lock:
            self._values[metric][label_key(metric, labels)] += value

    def show(self, metric: str, value: float, **labels: str) -> None:
        with self._lock:
            self._values[metric][label_key(metric, labels)] = value

    def counts(self) -> Counts:
        with self._lock:
            return {metric: dict(values) for metric, values in self._values.items()}

    def total(self, metric: str) -> float:
        """Over all labels."""
        return sum(self.counts().get(metric, {}).values())


def label_key(metric: str, labels: dict[str, str]) -> str:
    """Raises KeyError for a metric or a label that is not in METRICS."""
    return ",".join(labels[label] for label in METRICS[metric].labels)
