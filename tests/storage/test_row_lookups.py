"""Rows read past SQLAlchemy are the same records."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storage import job_steps
from storage.errors import RecordsFailed, RecordsUnavailable
from storage.job_record import JobFailure, JobRecord, NewJob
from storage.job_state import JobKind, JobState
from storage.jobs import new_job_id
from storage.records import Records
from storage.row_lookups import RowLookups

NOW = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
objects = st.dictionaries(st.text(), json_values, max_size=3)
zones = st.timezones() | st.just(timezone(timedelta(hours=5, minutes=30)))
times = st.datetimes(datetime(1990, 1, 1), datetime(2100, 1, 1), timezones=zones)  # noqa: DTZ001 aware by `timezones`
names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=30)

numbers = itertools.count()
unique_names = names.map(lambda name: f"{name} {next(numbers)}")


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Records]:
    records = Records(f"sqlite:///{tmp_path_factory.mktemp('rows') / 'a %23 name? of one.db'}")
    yield records
    records.close()


@pytest.fixture(scope="module")
def lookups(records: Records) -> Iterator[RowLookups]:
    assert records.file is not None
    lookups = RowLookups(records.file)
    yield lookups
    lookups.close()


@st.composite
def stored(draw: st.DrawFn) -> JobRecord:
    kind = draw(st.sampled_from(JobKind))
    job = NewJob(kind=kind, tenant=draw(names), request=draw(objects), runpod_id=draw(st.none() | unique_names))
    fields = {
        "state": draw(st.sampled_from(JobState)),
        "started_at": draw(st.none() | times),
        "finished_at": draw(st.none() | times),
        "lease_expires_at": draw(st.none() | times),
        "cancel_requested": draw(st.booleans()),
        "progress": draw(objects),
        "output": draw(st.none() | objects),
        "error": draw(st.none() | st.builds(JobFailure, code=names, message=names)),
        "worker_id": draw(st.none() | names),
        "timeout_s": draw(st.floats(1, 1e6)),
        "ttl_s": draw(st.none() | st.floats(1, 1e6)),
        "attempt": draw(st.integers(1, 9)),
    }
    record = job_steps.create(job, new_job_id(kind), NOW)
    return JobRecord.model_validate({**record.model_dump(), **fields})


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(record=stored())
def test_a_row_is_the_record_that_a_transaction_reads(records: Records, lookups: RowLookups, record: JobRecord) -> None:
    with records.write("test") as tx:
        written = tx.insert_missing(record)
    with records.read("test") as tx, lookups.read("test") as rows:
        found = rows.get(record.id)
        assert found == tx.get(record.id)
        if written:
            assert found is not None
            assert found.model_dump_json() == record.model_dump_json()
        if record.runpod_id is not None:
            assert rows.by_runpod_id(record.tenant, record.runpod_id) == tx.by_runpod_id(
                record.tenant, record.runpod_id
            )


def test_nothing_is_found_of_another_tenant_and_of_no_such_id(records: Records, lookups: RowLookups) -> None:
    record = job_steps.create(
        NewJob(kind=JobKind.TRAINING, tenant="a", request={}, runpod_id="known"), new_job_id(JobKind.TRAINING), NOW
    )
    with records.write("test") as tx:
        tx.insert_missing(record)
    with lookups.read("test") as rows:
        assert rows.by_runpod_id("a", "known") == record
        assert rows.by_runpod_id("b", "known") is None
        assert rows.get("train_ffffffffffff") is None


def test_a_file_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    lookups = RowLookups(tmp_path / "none.db")
    with pytest.raises(RecordsUnavailable), lookups.read("test") as rows:
        rows.get("train_ffffffffffff")
    assert not (tmp_path / "none.db").exists()


def test_what_is_no_database_is_a_failure_and_the_next_try_opens_it_anew(records: Records, tmp_path: Path) -> None:
    file = tmp_path / "records.db"
    file.write_bytes(b"not a database at all" * 100)
    lookups = RowLookups(file)
    with pytest.raises(RecordsFailed), lookups.read("test") as rows:
        rows.get("train_ffffffffffff")
    file.unlink()
    fresh = Records(f"sqlite:///{file}")
    with lookups.read("test") as rows:
        assert rows.get("train_ffffffffffff") is None
    fresh.close()
    lookups.close()
