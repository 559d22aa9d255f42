"""What a worker tells the driver of its training, and hears from it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

from ray.exceptions import GetTimeoutError, RayActorError

from train_jobs.board import StopReason
from train_jobs.progress import Progress
from train_jobs.reporting import BoardReporter


def test_reports_go_out_from_a_thread_and_bring_the_reason_to_stop() -> None:
    sent: list[dict[str, Any]] = []
    arrived = threading.Event()

    def exchange(progress: dict[str, Any]) -> StopReason | None:
        sent.append(progress)
        arrived.set()
        return "timed_out"

    reporter = BoardReporter(exchange, interval_s=0.001).start()
    assert arrived.wait(10)
    reporter.stage("saving")
    reporter.close()
    assert reporter.stop_reason == "timed_out"
    assert sent[-1]["stage"] == "saving"


def test_every_report_says_where_a_resumed_attempt_went_on_from() -> None:
    sent: list[dict[str, Any]] = []
    reporter = BoardReporter(lambda progress: sent.append(progress), interval_s=60)
    reporter.stage("training", step=5, resumed_from_step=5)
    reporter.progress(
        Progress(step=6, total_steps=9, loss=0.5, smoothed_loss=0.5, learning_rate=0.1, steps_per_s=1.0, eta_s=3.0)
    )
    reporter.start().close()
    assert (sent[-1]["step"], sent[-1]["resumed_from_step"]) == (6, 5)


def test_reports_leave_out_what_a_training_does_not_have_and_keep_where_its_logs_are() -> None:
    sent: list[dict[str, Any]] = []
    numbers: dict[str, Any] = {
        "step": 6, "total_steps": 9, "loss": 0.5, "smoothed_loss": 0.5, "learning_rate": 0.1, "steps_per_s": 0.0,
        "eta_s": None,
    }  # fmt: skip
    having = {"validation_loss": 0.4, "best_step": 0, "gpu_memory_peak_bytes": 6, "gpu_memory_total_bytes": 24}
    for more in ({}, having):
        reporter = BoardReporter(lambda progress: sent.append(progress), interval_s=60)
        reporter.stage("training", logs={"loss_key": "a"})
        reporter.progress(Progress(**numbers, **more))
        reporter.start().close()
        assert sent[-1] == {"stage": "training", "logs": {"loss_key": "a"}, **numbers, **more}


def test_reports_say_what_holds_up_the_work_and_for_how_long() -> None:
    sent: list[dict[str, Any]] = []
    reporter = BoardReporter(lambda progress: sent.append(progress), interval_s=60)
    reporter.stage("training", step=5)
    reporter.waiting(True)
    reporter.start().close()
    assert sent[-1] == {"stage": "waiting for storage", "step": 5}
    reporter = BoardReporter(lambda progress: sent.append(progress), interval_s=60)
    reporter.waiting(True)
    reporter.stage("training", step=6)
    reporter.waiting(False)
    reporter.start().close()
    assert sent[-1] == {"stage": "training", "step": 6}


def test_a_driver_that_is_gone_stops_the_work() -> None:
    def exchange(_: dict[str, Any]) -> StopReason | None:
        raise RayActorError

    reporter = BoardReporter(exchange, interval_s=0.001).start()
    reporter.close()
    assert reporter.stop_reason == "interrupted"


def test_a_driver_that_is_slow_does_not_stop_the_work() -> None:
    answers: Iterator[StopReason | Exception] = iter([GetTimeoutError(), "cancelled"])
    asked_twice = threading.Event()

    def exchange(_: dict[str, Any]) -> StopReason | None:
        answer = next(answers, "cancelled")
        if isinstance(answer, Exception):
            raise answer
        asked_twice.set()
        return answer

    reporter = BoardReporter(exchange, interval_s=0.001).start()
    assert asked_twice.wait(10)
    reporter.close()
    assert reporter.stop_reason == "cancelled"
