"""The driver of one training, without Ray: keeps the lease, watches, and settles the record exactly once."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from enum import IntEnum
from typing import Any, Protocol

from storage.errors import JobError, LeaseLost
from storage.job_record import Heartbeat, JobRecord
from train_jobs.board import StopReason
from train_jobs.errors import TrainingCancelled, TrainingError, TrainingInterrupted, TrainingTimedOut

logger = logging.getLogger(__name__)

HEARTBEAT_INTERVAL_S = 1.0
LEASE_S = 30.0
STOP_GRACE_S = 90.0


class ExitCode(IntEnum):
    COMPLETED = 0
    FAILED = 1
    INVALID = 2
    STOPPED = 130


class Jobs(Protocol):
    """What the driver needs of `storage.jobs_actor.BlockingJobs`."""

    def heartbeat(
        self, job_id: str, owner: str, *, progress: dict[str, Any] | None = None, lease_s: float = LEASE_S
    ) -> Heartbeat: ...

    def complete(self, job_id: str, owner: str, output: dict[str, Any]) -> JobRecord: ...

    def fail(self, job_id: str, owner: str, error_code: str, message: str, *, retryable: bool = False) -> JobRecord: ...

    def cancelled(self, job_id: str, owner: str, output: dict[str, Any] | None = None) -> JobRecord: ...

    def timed_out(self, job_id: str, owner: str, output: dict[str, Any] | None = None) -> JobRecord: ...


class Board(Protocol):
    """The driver's end of `board.RunBoard`."""

    def latest(self) -> tuple[int, dict[str, Any]]: ...

    def ask_to_stop(self, reason: StopReason) -> None: ...


class Driver:
    """Runs `fit` in a thread of its own, because Ray Train takes over SIGINT where it runs in the main thread.

    `fit` returns what `worker.train_worker` returned on rank 0. `explain` turns an exception of `fit` into one of
    ours. `say` gets a line for people about once a second.
    """

    def __init__(
        self,
        jobs: Jobs,
        job_id: str,
        owner: str,
        board: Board,
        fit: Callable[[], dict[str, Any]],
        *,
        explain: Callable[[BaseException], TrainingError],
        say: Callable[[str], None],
        interval_s: float = HEARTBEAT_INTERVAL_S,
        stop_grace_s: float = STOP_GRACE_S,
    ) -> None:
        self._jobs = jobs
        self._job_id = job_id
        self._owner = owner
        self._board = board
        self._fit = fit
        self._explain = explain
        self._say = say
        self._interval_s = interval_s
        self._stop_grace_s = stop_grace_s
        self._reason: StopReason | None = None
        self._asked = threading.Event()
        self._ended = threading.Event()
        self._result: Future[dict[str, Any]] = Future()
        self._reports = 0

    def stop(self, reason: StopReason) -> None:
        """Ask the training to end after its next step. Safe in a signal handler; the first reason stays."""
        self._reason = self._reason or reason
        self._asked.set()

    def run(self) -> ExitCode:
        """Until the training has ended and its record is settled."""
        threading.Thread(target=self._run_fit, name="fit", daemon=True).start()
        heartbeats = threading.Thread(target=self._keep_lease, name="heartbeat", daemon=True)
        heartbeats.start()
        self._watch()
        self._ended.set()
        heartbeats.join(timeout=2 * self._interval_s + 5.0)
        return self._settle()

    def _run_fit(self) -> None:
        try:
            self._result.set_result(self._fit())
        except BaseException as error:  # noqa: BLE001 - handed to the main thread, which settles the record with it
            self._result.set_exception(error)

    def _watch(self) -> None:
        """Wait for the result; once asked to stop, for a bounded time, and not at all before a worker has come."""
        waited_s = 0.0
        is_told = False
        while not self._is_done(self._interval_s):
            if not self._asked.is_set():
                continue
            if not is_told:
                is_told = True
                self._say(f"stopping after the next step ({self._reason})")
                self._tell_board()
            waited_s += self._interval_s
            if self._reports == 0 or waited_s >= self._stop_grace_s:
                return

    def _is_done(self, timeout_s: float) -> bool:
        try:
            self._result.exception(timeout=timeout_s)
        except TimeoutError:
            return False
        return True

    def _tell_board(self) -> None:
        try:
            self._board.ask_to_stop(self._reason or "interrupted")
        except Exception:
            logger.exception("the workers could not be asked to stop")

    def _keep_lease(self) -> None:
        last = ""
        progress: dict[str, Any] = {}
        while not self._ended.wait(self._interval_s):
            progress = self._read_board(progress)
            try:
                reply = self._jobs.heartbeat(
                    self._job_id, self._owner, progress=progress or {"stage": "starting"}, lease_s=LEASE_S
                )
            except LeaseLost:
                logger.error("the job belongs to somebody else now")
                self.stop("lease_lost")
                return
            except Exception:
                # The next heartbeat may succeed; if none does, the lease runs out and the job is somebody else's.
                logger.exception("a heartbeat failed")
                continue
            if reply.cancel_requested:
                self.stop("cancelled")
            elif reply.timed_out:
                self.stop("timed_out")
            line = progress_line(progress)
            if line and line != last:
                last = line
                self._say(line)

    def _read_board(self, before: dict[str, Any]) -> dict[str, Any]:
        """The latest progress. A board that does not answer must not cost the lease."""
        try:
            self._reports, progress = self._board.latest()
        except Exception:
            logger.warning("the workers' progress could not be read", exc_info=True)
            return before
        return progress

    def _settle(self) -> ExitCode:
        """Write the final status, in this one place. A record that is not ours any more is left alone."""
        if self._reason == "lease_lost":
            return ExitCode.FAILED
        try:
            return self._write_final()
        except JobError as error:
            logger.exception("the final status could not be written (%s)", error.code)
            return ExitCode.FAILED

    def _write_final(self) -> ExitCode:
        if not self._result.done():
            return self._write_stopped({})
        error = self._result.exception()
        if error is not None:
            if self._reason is not None:
                return self._write_stopped({})
            return self._write_failed(self._explain(error))
        result = self._result.result()
        if "output" in result and "stopped" not in result:
            self._jobs.complete(self._job_id, self._owner, result["output"])
            self._say("completed")
            return ExitCode.COMPLETED
        if "stopped" in result:
            self._reason = self._reason or result["stopped"]
            return self._write_stopped(result.get("output", {}))
        failure = result.get("failure") or {}
        return self._write_error(
            str(failure.get("code", TrainingError.code)),
            str(failure.get("message", TrainingError().public_message)),
            retryable=bool(failure.get("retryable", False)),
        )

    def _write_stopped(self, output: dict[str, Any]) -> ExitCode:
        if self._reason == "cancelled":
            self._jobs.cancelled(self._job_id, self._owner, output or None)
            self._say(TrainingCancelled().public_message)
            return ExitCode.STOPPED
        if self._reason == "timed_out":
            self._jobs.timed_out(self._job_id, self._owner, output or None)
            self._say(TrainingTimedOut().public_message)
            return ExitCode.FAILED
        self._write_failed(TrainingInterrupted())
        return ExitCode.STOPPED

    def _write_failed(self, error: TrainingError) -> ExitCode:
        return self._write_error(error.code, error.public_message, retryable=error.retryable)

    def _write_error(self, code: str, message: str, *, retryable: bool) -> ExitCode:
        self._jobs.fail(self._job_id, self._owner, code, message, retryable=retryable)
        self._say(f"failed ({code}): {message}")
        return ExitCode.FAILED


def progress_line(progress: dict[str, Any]) -> str:
    """A report as one line for people; empty when there is nothing to say."""
    stage = progress.get("stage", "")
    if stage != "training" or "loss" not in progress:
        done = f" {progress['done']}/{progress['of']}" if "done" in progress and "of" in progress else ""
        return f"{stage}{done}" if stage else ""
    eta_s = progress.get("eta_s")
    left = f"  eta {int(eta_s) // 60}:{int(eta_s) % 60:02d}" if eta_s is not None else ""
    return (
        f"step {progress['step']}/{progress['total_steps']}  loss {progress['loss']:.4f}"
        f"  smoothed {progress['smoothed_loss']:.4f}  {progress['steps_per_s']:.2f} steps/s{left}"
    )
