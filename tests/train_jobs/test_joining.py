"""A driver joins its cluster also where Ray does not answer at once."""

from __future__ import annotations

import pytest

from train_jobs.run import JOIN_ATTEMPTS_MAX, join_cluster


class Cluster:
    def __init__(self, *refusals: Exception) -> None:
        self.refusals = list(refusals)
        self.calls = 0

    def connect(self) -> None:
        self.calls += 1
        if self.refusals:
            raise self.refusals.pop(0)


def test_a_cluster_that_does_not_answer_in_time_is_asked_again() -> None:
    cluster, slept = Cluster(ConnectionError(), ConnectionError()), []
    join_cluster(cluster.connect, sleep=slept.append)
    assert cluster.calls == 3
    assert len(slept) == 2


def test_a_cluster_that_never_answers_is_given_up() -> None:
    cluster = Cluster(*[ConnectionError()] * 10)
    with pytest.raises(ConnectionError):
        join_cluster(cluster.connect, sleep=lambda _: None)
    assert cluster.calls == JOIN_ATTEMPTS_MAX


def test_anything_else_is_not_tried_again() -> None:
    cluster = Cluster(ValueError())
    with pytest.raises(ValueError):
        join_cluster(cluster.connect, sleep=lambda _: None)
    assert cluster.calls == 1
