from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from storage.errors import JobsUnavailable, LeaseLost
from storage.job_record import Heartbeat
from train_jobs.board import RunBoard
from train_jobs.driver import Driver, ExitCode, progress_line
from train_jobs.errors import DatasetEmpty, TrainingError, TrainingInterrupted

JOB = "train_0123456789ab"
OUTPUT = {"loras": [{"id": JOB}]}
TICK_S = 0.002


class Records:
    """The jobs actor's answers, and what was written to it."""

    def __init__(self) -> None:
        self.settled: list[tuple[Any, ...]] = []
        self.progress: list[dict[str, Any]] = []
        self.reply = Heartbeat(cancel_requested=False, timed_out=False)
        self.heartbeat_error: Exception | None = None
        self.settle_error: Exception | None = None
        self.beat = threading.Event()

    def heartbeat(self, job_id: str, owner: str, *, progress: Any = None, lease_s: float = 30.0) -> Heartbeat:
        self.beat.set()
        if self.heartbeat_error is not None:
            raise self.heartbeat_error
        self.progress.append(progress)
        return self.reply

    def complete(self, job_id: str, owner: str, output: dict[str, Any]) -> Any:
        self._settle("complete", output)

    def fail(self, job_id: str, owner: str, error_code: str, message: str, *, retryable: bool = False) -> Any:
        self._settle("fail", error_code, message, retryable)

    def cancelled(self, job_id: str, owner: str, output: Any = None) -> Any:
        self._settle("cancelled", output)

    def timed_out(self, job_id: str, owner: str, output: Any = None) -> Any:
        self._settle("timed_out", output)

    def _settle(self, *what: Any) -> None:
        if self.settle_error is not None:
            raise self.settle_error
        self.settled.append(what)


@pytest.fixture
def records() -> Records:
    return Records()


@pytest.fixture
def board() -> RunBoard:
    return RunBoard()


def _driver(
    records: Records,
    board: RunBoard,
    fit: Callable[[], dict[str, Any]],
    said: list[str] | None = None,
    *,
    grace_s: float = 30.0,
) -> Driver:
    lines = said if said is not None else []
    return Driver(
        records,
        JOB,
        "me",
        board,
        fit,
        explain=lambda error: error if isinstance(error, TrainingError) else TrainingError(),
        say=lines.append,
        interval_s=TICK_S,
        stop_grace_s=grace_s,
    )


def _until_stopped(board: RunBoard) -> Callable[[], dict[str, Any]]:
    """A worker that stops at the next step after it is asked to."""

    def fit() -> dict[str, Any]:
        pause = threading.Event()
        while (reason := board.report({"stage": "training"})) is None:
            pause.wait(TICK_S)
        return {"stopped": reason, "output": {"checkpoints": [{"step": 3}]}}

    return fit


def test_a_finished_training_is_completed_with_its_output(records: Records, board: RunBoard) -> None:
    assert _driver(records, board, lambda: {"output": OUTPUT}).run() is ExitCode.COMPLETED
    assert records.settled == [("complete", OUTPUT)]


def test_a_failure_of_the_request_is_final(records: Records, board: RunBoard) -> None:
    failure = {"code": "dataset_empty", "message": "No pictures.", "retryable": False}
    assert _driver(records, board, lambda: {"failure": failure}).run() is ExitCode.FAILED
    assert records.settled == [("fail", "dataset_empty", "No pictures.", False)]


@pytest.mark.parametrize(
    ("error", "code", "retryable"),
    [
        (DatasetEmpty("cats"), "dataset_empty", False),
        (TrainingInterrupted(), "training_interrupted", True),
        (ZeroDivisionError("secret"), "training_failed", False),
    ],
)
def test_an_error_becomes_a_code_and_a_public_message(
    records: Records, board: RunBoard, error: Exception, code: str, retryable: bool
) -> None:
    def fit() -> dict[str, Any]:
        raise error

    assert _driver(records, board, fit).run() is ExitCode.FAILED
    [(verb, settled_code, message, settled_retryable)] = records.settled
    assert (verb, settled_code, settled_retryable) == ("fail", code, retryable)
    assert "secret" not in message


def test_a_cancel_request_stops_the_workers_and_keeps_the_checkpoint(records: Records, board: RunBoard) -> None:
    records.reply = Heartbeat(cancel_requested=True, timed_out=False)
    assert _driver(records, board, _until_stopped(board)).run() is ExitCode.STOPPED
    assert records.settled == [("cancelled", {"checkpoints": [{"step": 3}]})]


def test_a_training_out_of_time_is_settled_as_such(records: Records, board: RunBoard) -> None:
    records.reply = Heartbeat(cancel_requested=False, timed_out=True)
    assert _driver(records, board, _until_stopped(board)).run() is ExitCode.FAILED
    assert records.settled == [("timed_out", {"checkpoints": [{"step": 3}]})]


def test_an_interrupted_training_may_be_tried_again(records: Records, board: RunBoard) -> None:
    driver = _driver(records, board, _until_stopped(board))
    driver.stop("interrupted")
    assert driver.run() is ExitCode.STOPPED
    assert [settled[:2] for settled in records.settled] == [("fail", "training_interrupted")]
    assert records.settled[0][3] is True


def test_the_first_reason_to_stop_stays(records: Records, board: RunBoard) -> None:
    driver = _driver(records, board, _until_stopped(board))
    driver.stop("cancelled")
    driver.stop("interrupted")
    driver.run()
    assert records.settled[0][0] == "cancelled"


def test_a_training_without_workers_is_stopped_at_once(records: Records, board: RunBoard) -> None:
    never = threading.Event()

    def fit() -> dict[str, Any]:
        never.wait(60)
        return {}

    driver = _driver(records, board, fit)
    driver.stop("cancelled")
    assert driver.run() is ExitCode.STOPPED
    assert records.settled == [("cancelled", None)]
    never.set()


def test_workers_that_do_not_stop_are_waited_for_a_bounded_time(records: Records, board: RunBoard) -> None:
    never = threading.Event()

    def fit() -> dict[str, Any]:
        board.report({"stage": "training"})
        never.wait(60)
        return {}

    driver = _driver(records, board, fit, grace_s=10 * TICK_S)
    driver.stop("cancelled")
    assert driver.run() is ExitCode.STOPPED
    assert records.settled == [("cancelled", None)]
    never.set()


def test_a_training_that_finished_anyway_is_completed(records: Records, board: RunBoard) -> None:
    driver = _driver(records, board, lambda: {"output": OUTPUT})
    driver.stop("cancelled")
    assert driver.run() is ExitCode.COMPLETED


def test_a_lost_lease_writes_nothing(records: Records, board: RunBoard) -> None:
    records.heartbeat_error = LeaseLost(JOB, "me")
    assert _driver(records, board, _until_stopped(board)).run() is ExitCode.FAILED
    assert records.settled == []
    assert board.report({}) == "lease_lost"


def test_a_heartbeat_that_fails_does_not_end_the_training(records: Records, board: RunBoard) -> None:
    records.heartbeat_error = JobsUnavailable("heartbeat")

    def fit() -> dict[str, Any]:
        records.beat.wait(10)
        return {"output": OUTPUT}

    assert _driver(records, board, fit).run() is ExitCode.COMPLETED


def test_a_board_that_does_not_answer_does_not_cost_the_lease(
    records: Records, board: RunBoard, monkeypatch: pytest.MonkeyPatch
) -> None:
    def latest() -> tuple[int, dict[str, Any]]:
        raise TimeoutError

    monkeypatch.setattr(board, "latest", latest)

    def fit() -> dict[str, Any]:
        assert records.beat.wait(10)
        return {"output": OUTPUT}

    assert _driver(records, board, fit).run() is ExitCode.COMPLETED
    assert {"stage": "starting"} in records.progress


@pytest.mark.parametrize("error", [LeaseLost(JOB, "me"), JobsUnavailable("complete")])
def test_a_final_status_that_cannot_be_written_is_a_failure(
    records: Records, board: RunBoard, error: Exception
) -> None:
    records.settle_error = error
    assert _driver(records, board, lambda: {"output": OUTPUT}).run() is ExitCode.FAILED


def test_progress_reaches_the_record_and_people(records: Records, board: RunBoard) -> None:
    said: list[str] = []

    def fit() -> dict[str, Any]:
        board.report({"stage": "caching", "done": 1, "of": 2})
        records.beat.clear()
        records.beat.wait(10)
        records.beat.clear()
        records.beat.wait(10)
        return {"output": OUTPUT}

    _driver(records, board, fit, said).run()
    assert {"stage": "caching", "done": 1, "of": 2} in records.progress
    assert "caching 1/2" in said
    assert said[-1] == "completed"


def test_a_start_that_waits_for_the_storage_says_so_until_it_goes_on(records: Records, board: RunBoard) -> None:
    said: list[str] = []

    def fit() -> dict[str, Any]:
        board.waiting(True)
        board.waiting(True)
        board.waiting(False)
        records.beat.clear()
        records.beat.wait(10)
        records.beat.clear()
        records.beat.wait(10)
        assert board.latest() == (0, {"stage": "waiting for storage"})
        board.waiting(False)
        assert board.latest() == (0, {})
        return {"output": OUTPUT}

    assert _driver(records, board, fit, said).run() is ExitCode.COMPLETED
    assert {"stage": "waiting for storage"} in records.progress
    assert "waiting for storage" in said


def test_a_wait_beside_workers_that_train_hides_nothing_of_their_progress(board: RunBoard) -> None:
    board.report({"stage": "training"})
    board.waiting(True)
    assert board.latest() == (1, {"stage": "training"})


def test_a_line_of_progress_is_readable() -> None:
    progress = {
        "stage": "training",
        "step": 12,
        "total_steps": 100,
        "loss": 0.12345,
        "smoothed_loss": 0.2,
        "steps_per_s": 3.217,
        "eta_s": 75.0,
    }
    assert progress_line(progress) == "step 12/100  loss 0.1235  smoothed 0.2000  3.22 steps/s  eta 1:15"
    assert progress_line({"stage": "model"}) == "model"
    assert progress_line({}) == ""
