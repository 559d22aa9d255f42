"""Trainings of an instance that leaves a cluster which stays."""

from __future__ import annotations

import pytest

from serve_app.stack.trainings import end


class Cluster:
    """Ray jobs that end a number of looks after they were told to; None: never."""

    def __init__(self, looks: dict[str, int | None], *, deaf: str = "") -> None:
        self.looks = looks
        self.deaf = deaf
        self.told: list[str] = []
        self.now_s = 0.0

    def submit(self, job_id: str, attempt: int) -> str:
        raise AssertionError("nothing is to be started")

    def stop(self, submission_id: str) -> None:
        if submission_id == self.deaf:
            raise ConnectionError
        self.told.append(submission_id)

    def status(self, submission_id: str) -> str:
        left = self.looks[submission_id]
        if left is None:
            return "RUNNING"
        self.looks[submission_id] = left - 1
        return "STOPPED" if left <= 0 else "RUNNING"

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds

    def end(self, *submissions: str, timeout_s: float = 30.0) -> None:
        end(list(submissions), self, timeout_s=timeout_s, clock=lambda: self.now_s, sleep=self.sleep)


def test_all_are_told_and_waited_for() -> None:
    cluster = Cluster({"a": 3, "b": 1})
    cluster.end("a", "b")
    assert cluster.told == ["a", "b"]
    assert cluster.looks == {"a": -1, "b": -1}


def test_one_that_cannot_be_told_keeps_no_other_from_it(caplog: pytest.LogCaptureFixture) -> None:
    cluster = Cluster({"b": 0}, deaf="a")
    cluster.end("a", "b")
    assert cluster.told == ["b"]
    assert "a could not be stopped" in caplog.text


def test_the_wait_has_an_end_and_tells_who_is_left(caplog: pytest.LogCaptureFixture) -> None:
    cluster = Cluster({"a": None, "b": 0})
    cluster.end("a", "b", timeout_s=5.0)
    assert cluster.now_s == 5.0
    assert "the trainings a were told" in caplog.text


def test_where_none_runs_nobody_waits() -> None:
    cluster = Cluster({})
    cluster.end()
    assert cluster.now_s == 0.0
