import sqlite3
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest

from storage.errors import RecordConflict, RecordsFailed, RecordsMisconfigured, RecordsUnavailable
from storage.job_record import JobRecord
from storage.job_state import JobKind, JobState
from storage.jobs_testing import JobsWorld
from storage.records import Records
from tests.storage.postgres import database

AT = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)


@pytest.fixture(params=["sqlite", "postgres"])
def records(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Records]:
    with database(request.param) as url:
        records = Records(url or f"sqlite:///{tmp_path / 'jobs.sqlite'}")
        yield records
        records.close()


def _record(number: int = 1, **fields: object) -> JobRecord:
    values: dict[str, object] = {
        "id": f"gen_{number:012x}",
        "tenant": "default",
        "kind": JobKind.GENERATION,
        "state": JobState.QUEUED,
        "request": {"prompt": "Äpfel", "nested": [1, None, {"a": 1.5}]},
        "source": "http",
        "created_at": AT,
        "queued_at": AT,
        "updated_at": AT,
        "timeout_s": 60.0,
    }
    return JobRecord.model_validate(values | fields)


def _save(records: Records, *saved: JobRecord) -> None:
    with records.write("test") as tx:
        for record in saved:
            tx.insert(record)


def test_a_record_comes_back_as_it_was_written(records: Records):
    record = _record(
        runpod_id="abc-u1",
        started_at=AT,
        lease_owner="w1",
        lease_expires_at=AT + timedelta(seconds=3),
        notes={"warnings": ["Unknown field 'stepz' was ignored"]},
        progress={"step": 3, "loss": 0.25},
        error={"code": "x", "message": "y"},
        output={"images": []},
        ttl_s=9.5,
    )
    _save(records, record)
    with records.read("test") as tx:
        assert tx.get(record.id) == record
        assert tx.by_runpod_id("default", "abc-u1") == record


def test_a_record_survives_its_json_form_exactly():
    record = _record(error={"code": "x", "message": "y"}, cancel_requested=True, cancel_requested_at=AT)
    assert JobRecord.model_validate_json(record.model_dump_json()) == record


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_a_database_from_before_there_were_notes_is_read_and_written(tmp_path: Path, kind: str):
    old, new = _record(1), _record(2, notes={"warnings": ["x"]})
    with database(kind) as given:
        url = given or f"sqlite:///{tmp_path / 'jobs.sqlite'}"
        records = Records(url)
        _save(records, old)
        with records.write("test") as tx:
            tx._connection.exec_driver_sql("ALTER TABLE jobs DROP COLUMN notes")
        records.close()
        for _ in range(2):
            records = Records(url)
            with records.write("test") as tx:
                tx.insert_missing(new)
                assert (tx.get(old.id), tx.get(new.id)) == (old, new)
            records.close()


def test_a_mirrored_record_from_before_there_were_notes_is_read():
    written = _record().model_dump(mode="json")
    del written["notes"]
    assert JobRecord.model_validate(written) == _record()


def test_times_are_stored_in_utc_and_read_aware(records: Records, tmp_path: Path):
    east = AT.astimezone(timezone(timedelta(hours=5)))
    _save(records, _record(created_at=east))
    with records.read("test") as tx:
        read = tx.get(_record().id)
    assert read is not None
    assert read.created_at == AT
    assert read.created_at.tzinfo is UTC
    if records.file is None:
        return
    connection = sqlite3.connect(tmp_path / "jobs.sqlite")
    assert connection.execute("SELECT created_at FROM jobs").fetchone() == ("2026-01-02 03:04:05.678901",)
    connection.close()


def test_the_database_is_in_wal_mode_with_foreign_keys_and_full_sync(tmp_path: Path):
    records = Records(f"sqlite:///{tmp_path / 'jobs.sqlite'}")
    connection = sqlite3.connect(tmp_path / "jobs.sqlite")
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    connection.close()
    with pytest.raises(RecordConflict), records.write("test") as tx:
        tx.open_submission("train_x", "train_that_is_not_there")
    records.close()


def test_an_error_undoes_the_whole_transaction(records: Records):
    def fails() -> None:
        with records.write("test") as tx:
            tx.insert(_record())
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fails()
    with records.read("test") as tx:
        assert tx.get(_record().id) is None
        assert tx.outbox_size() == 0


def test_an_id_or_a_runpod_id_cannot_be_taken_twice(records: Records):
    _save(records, _record(1, runpod_id="r"))
    with pytest.raises(RecordConflict):
        _save(records, _record(1))
    with pytest.raises(RecordConflict):
        _save(records, _record(2, runpod_id="r"))
    _save(records, _record(3, runpod_id="r", tenant="other"))


def test_a_submission_belongs_to_one_job_for_ever(records: Records):
    _save(records, _record(1), _record(2))
    with records.write("test") as tx:
        tx.open_submission("s", _record(1).id)
        tx.open_submission("s", _record(1).id)
        assert [submission.submission_id for submission in tx.submissions()] == ["s"]
    with pytest.raises(RecordConflict), records.write("test") as tx:
        tx.open_submission("s", _record(2).id)


def test_an_outbox_entry_queued_again_meanwhile_stays(records: Records):
    _save(records, _record())
    with records.read("test") as tx:
        [first] = tx.outbox(10)
    with records.write("test") as tx:
        tx.save(_record(priority=5))
    with records.write("test") as tx:
        tx.settle_outbox(written=[first.seq], failed=[])
    with records.read("test") as tx:
        [second] = tx.outbox(10)
    assert second.seq > first.seq
    assert second.record.priority == 5


def test_outbox_entries_that_failed_come_after_the_others(records: Records):
    _save(records, _record(1), _record(2))
    with records.write("test") as tx:
        first, _ = tx.outbox(10)
        tx.settle_outbox(written=[], failed=[first.seq])
        assert [entry.record.id for entry in tx.outbox(10)] == [_record(2).id, _record(1).id]


def test_a_missing_or_volatile_database_is_refused():
    for url in ("sqlite://", "sqlite:///:memory:", "nonsense", "nosuchdialect://host/db"):
        with pytest.raises(RecordsMisconfigured):
            Records(url)


def test_a_file_that_is_no_database_is_an_error_of_ours(tmp_path: Path):
    (tmp_path / "jobs.sqlite").write_bytes(b"this is no database, only some text" * 100)
    with pytest.raises(RecordsFailed):
        Records(f"sqlite:///{tmp_path / 'jobs.sqlite'}")


def test_a_place_that_cannot_be_opened_is_unavailable(tmp_path: Path):
    (tmp_path / "jobs.sqlite").mkdir()
    with pytest.raises(RecordsUnavailable):
        Records(f"sqlite:///{tmp_path / 'jobs.sqlite'}")


def test_readers_do_not_wait_for_a_writer(records: Records):
    _save(records, _record())
    with records.write("test") as tx:
        tx.save(_record(priority=5))
        seen: list[JobRecord | None] = []

        def read() -> None:
            with records.read("test") as reading:
                seen.append(reading.get(_record().id))

        reader = threading.Thread(target=read)
        reader.start()
        reader.join(timeout=20)
    assert seen == [_record()]


def test_the_folder_of_the_database_is_made(tmp_path: Path):
    JobsWorld(tmp_path).close()
    assert (tmp_path / "records" / "jobs.sqlite").exists()
