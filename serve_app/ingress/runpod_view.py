"""Job records and kept replies as RunPod's status objects. Pure; times in milliseconds."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

from serve_app.dispatch.reply import Reply
from serve_app.job_types.context import is_accepted_only, public_runpod_id
from serve_app.job_types.process_object import error_text
from serve_app.settings import RequestLimits
from storage.job_record import JobRecord
from storage.job_state import JobState

SYNC_PREFIX = "sync-"
RUNPOD_STATUS = {
    JobState.QUEUED: "IN_QUEUE",
    JobState.STARTING: "IN_PROGRESS",
    JobState.RUNNING: "IN_PROGRESS",
    JobState.COMPLETED: "COMPLETED",
    JobState.FAILED: "FAILED",
    JobState.CANCELLED: "CANCELLED",
    JobState.TIMED_OUT: "TIMED_OUT",
}


def runpod_status(record: JobRecord) -> str:
    """A RunPod job that was only the acceptance of a process is completed from the start."""
    return "COMPLETED" if is_accepted_only(record) else RUNPOD_STATUS[record.state]


def ended_at(record: JobRecord) -> datetime | None:
    """When the RunPod job ended, None while it lasts."""
    return record.created_at if is_accepted_only(record) else record.finished_at


def is_expired(record: JobRecord, now: datetime, limits: RequestLimits) -> bool:
    """Whether the status of an ended job is no longer kept; its process record and files are."""
    ended = ended_at(record)
    sync = (public_runpod_id(record) or "").startswith(SYNC_PREFIX)
    kept_s = limits.runsync_result_kept_s if sync else limits.run_result_kept_s
    return ended is not None and now >= ended + timedelta(seconds=kept_s)


def record_view(record: JobRecord, now: datetime, output: dict[str, Any] | None) -> dict[str, Any]:
    """`output` is the presented output, None where there is none yet."""
    view: dict[str, Any] = {
        "id": public_runpod_id(record),
        "status": runpod_status(record),
        "delayTime": _delay_ms(record, now),
        "executionTime": execution_ms(record, now),
    }
    if output is not None:
        view["output"] = output
    if not is_accepted_only(record):
        error = error_text(record)
        if error is not None and record.state.is_terminal:
            view["error"] = error
        if record.attempt > 1:
            view["retries"] = record.attempt - 1
    if record.worker_id is not None:
        view["workerId"] = record.worker_id
    return view


def reply_view(runpod_id: str, reply: Reply, now: datetime, worker_id: str) -> dict[str, Any]:
    """Its output holds links where clients see URLs."""
    view: dict[str, Any] = {
        "id": runpod_id,
        "status": reply.status,
        "delayTime": 0,
        "executionTime": _ms((reply.finished_at or now) - reply.created_at),
        "workerId": worker_id,
    }
    if reply.output is not None:
        view["output"] = reply.output
    if reply.error is not None:
        view["error"] = reply.error
    if reply.attempt > 1:
        view["retries"] = reply.attempt - 1
    return view


def stamped(
    output: dict[str, Any],
    *,
    request_id: str,
    worker_id: str | None,
    runpod_id: str | None,
    duration_ms: int,
    timestamp: datetime,
) -> dict[str, Any]:
    """What every output carries beside its own fields. A process object's `worker_id` is that of its own worker."""
    return {
        "worker_id": worker_id,
        **output,
        "request_id": request_id,
        "runpod_job_id": runpod_id,
        "timing": {"duration_ms": duration_ms, "timestamp": timestamp.isoformat()},
    }


def execution_ms(record: JobRecord, now: datetime) -> int:
    if is_accepted_only(record) or record.started_at is None:
        return 0
    return _ms((record.finished_at or now) - record.started_at)


def _delay_ms(record: JobRecord, now: datetime) -> int:
    """From asking for the work (or its last retry) to its start; until now, or its end, where it did not start."""
    if is_accepted_only(record):
        return 0
    return _ms((record.started_at or record.finished_at or now) - record.queued_at)


def _ms(span: timedelta) -> int:
    return max(0, round(span.total_seconds() * 1000))
