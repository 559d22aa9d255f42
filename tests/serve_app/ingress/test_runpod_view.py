from datetime import UTC, datetime, timedelta
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from serve_app.ingress.runpod_view import is_expired, record_view, runpod_status
from serve_app.job_types.context import ACCEPTED_PREFIX
from serve_app.job_types.process_object import process_object
from serve_app.settings import RequestLimits
from serve_app.testing import BUCKET, keys_of
from storage.job_record import JobFailure, JobRecord
from storage.job_state import JobKind, JobState

START = datetime(2026, 1, 2, tzinfo=UTC)
RUNPOD_STATUSES = {"IN_QUEUE", "IN_PROGRESS", "COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT"}
OLDER_STATUSES = {"starting", "running", "completed", "failed", "cancelled"}
FINAL = {"COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT"}

seconds = st.integers(0, 10**6)


@st.composite
def records(draw: st.DrawFn) -> JobRecord:
    state = draw(st.sampled_from(JobState))
    queued_at = START + timedelta(seconds=draw(seconds))
    started = draw(st.none() | seconds) if state is not JobState.QUEUED else None
    if state in {JobState.RUNNING, JobState.COMPLETED} and started is None:
        started = 1
    started_at = None if started is None else queued_at + timedelta(seconds=started)
    finished_at = (started_at or queued_at) + timedelta(seconds=draw(seconds)) if state.is_terminal else None
    kind = draw(st.sampled_from(JobKind))
    prefix = draw(st.sampled_from(["", ACCEPTED_PREFIX]))
    return JobRecord(
        id=f"{kind.id_prefix}0123456789ab",
        tenant="matt",
        kind=kind,
        state=state,
        request={},
        source="http",
        runpod_id=f"{prefix}{draw(st.sampled_from(['', 'sync-']))}x-u1",
        created_at=START,
        queued_at=queued_at,
        updated_at=finished_at or started_at or queued_at,
        started_at=started_at,
        finished_at=finished_at,
        attempt=draw(st.integers(1, 3)),
        progress=draw(st.dictionaries(st.sampled_from(["step", "total_steps", "loss"]), st.integers(0, 100))),
        error=JobFailure(code="c", message="m") if state is JobState.FAILED else None,
        timeout_s=60.0,
    )


def view_of(record: JobRecord, output: dict[str, Any] | None = None) -> dict[str, Any]:
    return record_view(record, record.updated_at + timedelta(seconds=5), output)


@given(records())
def test_a_view_has_runpods_fields_and_no_others(record: JobRecord) -> None:
    view = view_of(record, {"a": 1})
    assert {"id", "status", "delayTime", "executionTime"} <= set(view)
    assert set(view) <= {"id", "status", "delayTime", "executionTime", "output", "error", "retries", "workerId"}
    assert view["status"] in RUNPOD_STATUSES
    assert not view["id"].startswith(ACCEPTED_PREFIX)


@given(records())
def test_times_are_whole_milliseconds_and_never_negative(record: JobRecord) -> None:
    view = view_of(record)
    for name in ("delayTime", "executionTime"):
        assert isinstance(view[name], int)
        assert view[name] >= 0


@given(records())
def test_error_is_a_string_and_only_where_the_job_failed(record: JobRecord) -> None:
    view = view_of(record)
    assert ("error" in view) == (view["status"] in {"FAILED", "TIMED_OUT"})
    assert isinstance(view.get("error", ""), str)


@given(records())
def test_a_job_that_was_only_accepted_is_completed_whatever_becomes_of_its_process(record: JobRecord) -> None:
    accepted = (record.runpod_id or "").startswith(ACCEPTED_PREFIX)
    assert (runpod_status(record) == "COMPLETED") == (accepted or record.state is JobState.COMPLETED)


@given(records())
def test_an_unfinished_job_never_expires(record: JobRecord) -> None:
    limits = RequestLimits()
    late = record.updated_at + timedelta(days=30)
    assert is_expired(record, late, limits) == (runpod_status(record) in FINAL)


@given(records())
def test_a_final_status_stays_for_at_least_a_minute(record: JobRecord) -> None:
    ended = record.finished_at or record.created_at
    if runpod_status(record) in FINAL and not (record.runpod_id or "").startswith(ACCEPTED_PREFIX):
        assert not is_expired(record, ended + timedelta(seconds=59), RequestLimits())


@given(records())
def test_a_process_object_has_every_field_and_an_older_status(record: JobRecord) -> None:
    process = process_object(record, keys_of("matt"), BUCKET, record.updated_at)
    assert set(process) == {
        "id",
        "type",
        "status",
        "config",
        "created_at",
        "updated_at",
        "output_path",
        "error",
        "worker_id",
        "job_id",
        "metrics",
        "progress",
        "step",
        "total_steps",
        "eta",
        "elapsed_time",
        "gpu_id",
    }
    assert process["status"] in OLDER_STATUSES
    assert 0 <= process["progress"] <= 100
    assert process["output_path"].endswith(f"/matt/processes/{record.id}/")


def test_delay_ends_where_execution_begins() -> None:
    record = JobRecord(
        id="gen_0123456789ab",
        tenant="matt",
        kind=JobKind.GENERATION,
        state=JobState.COMPLETED,
        request={},
        source="http",
        runpod_id="x-u1",
        created_at=START,
        queued_at=START,
        updated_at=START + timedelta(seconds=5),
        started_at=START + timedelta(seconds=2),
        finished_at=START + timedelta(seconds=5),
        timeout_s=60.0,
        worker_id="w",
        attempt=2,
    )
    assert view_of(record, {"a": 1}) == {
        "id": "x-u1",
        "status": "COMPLETED",
        "delayTime": 2000,
        "executionTime": 3000,
        "output": {"a": 1},
        "retries": 1,
        "workerId": "w",
    }
