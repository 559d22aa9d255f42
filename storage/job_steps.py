"""The steps of a job's life as pure functions from a record to the next. `storage.jobs` decides who may take them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

from storage.errors import IllegalTransition, LeaseLost
from storage.job_record import LAUNCHER_OWNER, SETTLED_BY_SWEEP, JobFailure, JobRecord, NewJob
from storage.job_state import JobState, check_transition

_TICK = timedelta(microseconds=1)


def create(job: NewJob, job_id: str, now: datetime) -> JobRecord:
    record = JobRecord(
        id=job_id,
        tenant=job.tenant,
        kind=job.kind,
        state=JobState.QUEUED,
        request=finite(job.request),
        notes=job.notes,
        source=job.source,
        runpod_id=job.runpod_id,
        created_at=now,
        queued_at=now,
        updated_at=now,
        attempts_max=job.attempts_max,
        submission_id=job.submission_id,
        timeout_s=job.timeout_s,
        ttl_s=job.ttl_s,
        priority=job.priority,
    )
    return record if job.owner is None else lease(record, job.owner, now, job.lease_s)


def lease(record: JobRecord, owner: str, now: datetime, lease_s: float) -> JobRecord:
    """Give or renew the lease. A queued job is STARTING from then on; any other stays as it is."""
    changes: dict[str, Any] = {"lease_owner": owner, "lease_expires_at": now + timedelta(seconds=lease_s)}
    if record.state is JobState.QUEUED:
        return _moved(record, JobState.STARTING, now, **changes)
    return record.model_copy(update=changes)


def start(record: JobRecord, now: datetime, worker_id: str | None, lease_s: float) -> JobRecord:
    expires_at = now + timedelta(seconds=lease_s)
    return _moved(record, JobState.RUNNING, now, started_at=now, worker_id=worker_id, lease_expires_at=expires_at)


def report(record: JobRecord, now: datetime, progress: dict[str, Any]) -> JobRecord:
    return _touched(record, now, progress=finite(progress))


def submit(record: JobRecord, now: datetime, submission_id: str) -> JobRecord:
    return _touched(record, now, submission_id=submission_id)


def ask_to_cancel(record: JobRecord, now: datetime) -> JobRecord:
    return _touched(record, now, cancel_requested=True, cancel_requested_at=now)


def settle(
    record: JobRecord,
    state: JobState,
    now: datetime,
    *,
    by: str,
    output: dict[str, Any] | None = None,
    error: JobFailure | None = None,
) -> JobRecord:
    """The one place where a job gets its final state."""
    assert state.is_terminal
    return _moved(
        record,
        state,
        now,
        finished_at=now,
        settled_by=by,
        output=None if output is None else finite(output),
        error=error,
        lease_owner=None,
        lease_expires_at=None,
    )


def time_out(record: JobRecord, now: datetime, *, by: str, output: dict[str, Any] | None = None) -> JobRecord:
    limit_s = record.timeout_s if _ran_out(record.started_at, record.timeout_s, now) else record.ttl_s
    message = f"The job did not end within {limit_s or record.timeout_s:g} seconds."
    error = JobFailure(code="timed_out", message=message)
    return settle(record, JobState.TIMED_OUT, now, by=by, output=output, error=error)


def interrupt(record: JobRecord, now: datetime, *, by: str, code: str, message: str) -> JobRecord:
    """End an attempt that did not end by itself: the job is queued again, or ends where no attempt may follow."""
    if record.cancel_requested:
        return settle(record, JobState.CANCELLED, now, by=by)
    if out_of_time(record, now):
        return time_out(record, now, by=by)
    if record.attempt >= record.attempts_max:
        attempts = "its only attempt" if record.attempt == 1 else f"{record.attempt} attempts"
        error = JobFailure(code=code, message=f"{message} The job was given up after {attempts}.")
        return settle(record, JobState.FAILED, now, by=by, error=error)
    # The place in the queue is kept: the user has been waiting since queued_at.
    progress = {**record.progress, "message": message}
    return _moved(record, JobState.QUEUED, now, attempt=record.attempt + 1, progress=progress, **_UNSTARTED)


def hand_back(record: JobRecord, now: datetime, *, by: str) -> JobRecord:
    """Its owner was told to stop: the same attempt waits for another owner, at its old place in the queue."""
    if record.cancel_requested:
        return settle(record, JobState.CANCELLED, now, by=by)
    if out_of_time(record, now):
        return time_out(record, now, by=by)
    return _moved(record, JobState.QUEUED, now, **_UNSTARTED)


def allow_attempts(record: JobRecord, now: datetime, attempts_max: int) -> JobRecord:
    """At least so many attempts in all. Returns the same record where it may have them already."""
    if record.attempts_max >= attempts_max:
        return record
    return _touched(record, now, attempts_max=attempts_max)


def sweep(record: JobRecord, now: datetime, *, cancel_grace_s: float, timeout_grace_s: float) -> JobRecord:
    """What becomes of a job that nobody moves any more. Returns the same record where there is nothing to do."""
    if record.state.is_terminal:
        return record
    if record.state is JobState.QUEUED:
        expired = _ran_out(record.queued_at, record.ttl_s, now)
        return time_out(record, now, by=SETTLED_BY_SWEEP) if expired else record
    if _ran_out(record.cancel_requested_at, cancel_grace_s, now):
        return settle(record, JobState.CANCELLED, now, by=SETTLED_BY_SWEEP)
    if out_of_time(record, now - timedelta(seconds=timeout_grace_s)):
        return time_out(record, now, by=SETTLED_BY_SWEEP)
    if lease_expired(record, now):
        return interrupt(
            record, now, by=SETTLED_BY_SWEEP, code="lease_lost", message="The worker of this job stopped answering."
        )
    return record


def queue_again(record: JobRecord, now: datetime) -> JobRecord:
    """A retry that the user asked for. It always brings one more attempt."""
    return _moved(
        record,
        JobState.QUEUED,
        now,
        attempt=record.attempt + 1,
        attempts_max=max(record.attempts_max, record.attempt + 1),
        queued_at=now,
        finished_at=None,
        settled_by=None,
        output=None,
        error=None,
        progress={},
        cancel_requested=False,
        cancel_requested_at=None,
        **_UNSTARTED,
    )


def drop_outputs(record: JobRecord, names: Sequence[str], now: datetime) -> JobRecord:
    """The lists `names` of its output, emptied. Raises IllegalTransition for a job that has not ended."""
    if not record.state.is_terminal:
        raise IllegalTransition(record.id, record.state.value, record.state.value)
    output = record.output or {}
    emptied: dict[str, list[Any]] = {name: [] for name in names if output.get(name)}
    return _touched(record, now, output={**output, **emptied}) if emptied else record


def check_owner(record: JobRecord, owner: str) -> None:
    """Raises LeaseLost unless `owner` holds the lease. A lease that ran out and was not taken away still counts."""
    if not record.state.is_leased or record.lease_owner != owner:
        raise LeaseLost(record.id, owner)


def may_adopt(record: JobRecord, owner: str, submission_id: str | None, now: datetime) -> bool:
    if record.state.is_terminal:
        return False
    if record.state is JobState.QUEUED:
        # A queued job that names a Ray job was queued because that Ray job was given up.
        return submission_id is None or submission_id != record.submission_id
    if submission_id is not None and record.submission_id not in (None, submission_id):
        return False
    return record.lease_owner in (owner, LAUNCHER_OWNER) or lease_expired(record, now)


def lease_expired(record: JobRecord, now: datetime) -> bool:
    return record.lease_expires_at is not None and record.lease_expires_at <= now


def out_of_time(record: JobRecord, now: datetime) -> bool:
    return _ran_out(record.started_at, record.timeout_s, now) or _ran_out(record.queued_at, record.ttl_s, now)


def finite(value: Any) -> Any:
    """The same JSON value with null for NaN and infinities, which JSON does not have; a diverged loss is one."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


_UNSTARTED: dict[str, Any] = {"started_at": None, "worker_id": None, "lease_owner": None, "lease_expires_at": None}


def _ran_out(since: datetime | None, limit_s: float | None, now: datetime) -> bool:
    return since is not None and limit_s is not None and since + timedelta(seconds=limit_s) <= now


def _moved(record: JobRecord, state: JobState, now: datetime, **changes: Any) -> JobRecord:
    check_transition(record.id, record.state, state)
    return _touched(record, now, state=state, **changes)


def _touched(record: JobRecord, now: datetime, **changes: Any) -> JobRecord:
    # updated_at serves as a version, so it grows even where the clock does not.
    return record.model_copy(update={"updated_at": max(now, record.updated_at + _TICK), **changes})
