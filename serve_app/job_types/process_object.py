"""A job record as the process object that the older API speaks of. Pure."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from serve_app.job_types.context import public_runpod_id
from storage.job_record import JobRecord
from storage.job_state import JobKind, JobState
from storage.keys import Keys

OLDER_STATUS = {
    JobState.QUEUED: "starting",
    JobState.STARTING: "starting",
    JobState.RUNNING: "running",
    JobState.COMPLETED: "completed",
    JobState.FAILED: "failed",
    JobState.TIMED_OUT: "failed",
    JobState.CANCELLED: "cancelled",
}
METRICS = (
    "loss",
    "smoothed_loss",
    "steps_per_s",
    "stage",
    "resumed_from_step",
    "validation_loss",
    "best_step",
    "gpu_memory_peak_bytes",
    "gpu_memory_total_bytes",
)


def process_status(record: JobRecord) -> str:
    return OLDER_STATUS[record.state]


def steps_of(record: JobRecord) -> tuple[int | None, int | None]:
    """The steps that are done, and how many there are in all."""
    step, total = count_of(record.progress.get("step")), count_of(record.progress.get("total_steps"))
    # What a generation reports last is some step before its end; a training may end before its last step.
    is_whole = record.kind is JobKind.GENERATION and record.state is JobState.COMPLETED
    return (total, total) if is_whole and total is not None else (step, total)


def live_fields(record: JobRecord, now: datetime) -> dict[str, Any]:
    """How far the work is. `elapsed_time` and `eta` in seconds, `progress` in percent."""
    step, total = steps_of(record)
    return {
        "progress": progress_percent(record, step, total),
        "step": step,
        "total_steps": total,
        "eta": None if record.state.is_terminal else record.progress.get("eta_s"),
        "elapsed_time": elapsed_s(record, now),
        "metrics": {name: record.progress[name] for name in METRICS if name in record.progress},
    }


def process_object(record: JobRecord, keys: Keys, bucket: str, now: datetime) -> dict[str, Any]:
    """Every field is always there. Times are ISO 8601 in UTC."""
    return {
        "id": record.id,
        "type": record.kind.value,
        "status": process_status(record),
        "config": record.request,
        "created_at": record.created_at.isoformat(),
        "updated_at": record.updated_at.isoformat(),
        "output_path": f"s3://{bucket}/{keys.process_prefix(record.id)}",
        "error": error_text(record),
        "worker_id": record.worker_id,
        "job_id": public_runpod_id(record),
        **live_fields(record, now),
        "gpu_id": record.progress.get("gpu_id"),
    }


def error_text(record: JobRecord) -> str | None:
    """Why the job did not complete, None where it did or may yet."""
    if record.state is JobState.TIMED_OUT:
        return _time_that_ran_out(record)
    if record.error is not None:
        return record.error.message
    return "The job failed" if record.state is JobState.FAILED else None


def _time_that_ran_out(record: JobRecord) -> str:
    """The work's own, or that of the whole job: which of them a record tells by its times alone."""
    if record.started_at is None:
        return f"The job waited longer than its time to live{_of(record.ttl_s)}"
    ended_at = record.finished_at or record.updated_at
    worked_s = (ended_at - record.started_at).total_seconds()
    lived_s = (ended_at - record.queued_at).total_seconds()
    if worked_s < record.timeout_s and record.ttl_s is not None and lived_s >= record.ttl_s:
        return f"The job did not end within its time to live{_of(record.ttl_s)}"
    return f"Request timeout after {record.timeout_s:g} seconds"


def _of(seconds: float | None) -> str:
    return "" if seconds is None else f" of {seconds:g} seconds"


def elapsed_s(record: JobRecord, now: datetime) -> float | None:
    """Seconds that the present attempt has run, None before it starts."""
    if record.started_at is None:
        return None
    return max(0.0, ((record.finished_at or now) - record.started_at).total_seconds())


def progress_percent(record: JobRecord, step: int | None, total: int | None) -> float:
    if record.state is JobState.COMPLETED:
        return 100.0
    if step is None or not total:
        return 0.0
    return round(min(100.0, 100.0 * step / total), 2)


def count_of(value: Any) -> int | None:
    """A number of things in a report, None where there is none."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None
