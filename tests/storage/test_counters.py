from __future__ import annotations

import time

import pytest

from storage import counters
from storage.counters import METRICS, Tally
from storage.ray_counters import RayCounters


def test_counts_add_up_by_labels_and_gauges_keep_the_last_value() -> None:
    tally = Tally()

    tally.add(counters.RETRIES, operation="get", reason="timeout")
    tally.add(counters.RETRIES, 2, operation="get", reason="timeout")
    tally.add(counters.RETRIES, reason="throttled", operation="put")
    tally.show(counters.BREAKER_STATE, 2)
    tally.show(counters.BREAKER_STATE, 0)

    assert tally.counts() == {
        counters.RETRIES: {"get,timeout": 3, "put,throttled": 1},
        counters.BREAKER_STATE: {"": 0},
    }
    assert tally.total(counters.RETRIES) == 4
    assert tally.total(counters.ATTEMPTS) == 0


def test_a_metric_or_a_label_that_nobody_declared_is_a_mistake() -> None:
    tally = Tally()

    with pytest.raises(KeyError):
        tally.add("raylora_unknown_total")
    with pytest.raises(KeyError):
        tally.add(counters.RETRIES, operation="get")


def test_every_metric_is_one_that_ray_accepts() -> None:
    """Ray's metrics take values without a cluster; they go nowhere then."""
    tally = RayCounters()

    for name, metric in METRICS.items():
        labels = dict.fromkeys(metric.labels, "x")
        if metric.kind == "counter":
            tally.add(name, 0, **labels)
            tally.add(name, 3, **labels)
        else:
            tally.show(name, 3, **labels)
    tally.flush()

    assert {name: sum(values.values()) for name, values in tally.counts().items()} == dict.fromkeys(METRICS, 3)


def test_ray_hears_of_each_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[tuple[float, dict[str, str]]] = []
    tally = RayCounters()
    monkeypatch.setattr(tally._metrics[counters.RETRIES], "inc", lambda value, tags: heard.append((value, tags)))

    for reason in ("timeout", "timeout", "throttled"):
        tally.add(counters.RETRIES, operation="get", reason=reason)
    tally.flush()
    tally.flush()
    tally.add(counters.RETRIES, operation="get", reason="timeout")
    until = time.monotonic() + 30
    while len(heard) < 3 and time.monotonic() < until:
        time.sleep(0.05)

    get = {"operation": "get"}
    assert heard == [
        (2, {**get, "reason": "timeout"}),
        (1, {**get, "reason": "throttled"}),
        (1, {**get, "reason": "timeout"}),
    ]
