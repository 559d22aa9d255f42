"""For tests: the real life cycle over a real database, with a clock that moves when told and a scripted cluster."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from storage.job_record import JobRecord, NewJob, submission_id_for
from storage.job_state import JobKind
from storage.jobs import Jobs, JobsPolicy
from storage.records import Records


class ManualClock:
    def __init__(self) -> None:
        self.now = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


class JobsWorld:
    """`Jobs` over the database at `url`, or an SQLite file below `folder`; and shorthands to bring a job to a state."""

    def __init__(self, folder: Path, policy: JobsPolicy | None = None, *, url: str | None = None) -> None:
        self.url = url or f"sqlite:///{folder / 'records' / 'jobs.sqlite'}"
        self.clock = ManualClock()
        self.policy = policy or JobsPolicy(cancel_grace_s=120.0, timeout_grace_s=60.0, idempotency_ttl_s=3600.0)
        self._open()

    def _open(self) -> None:
        self.records = Records(self.url)
        self.jobs = Jobs(self.records, policy=self.policy, clock=self.clock)

    def restart(self) -> None:
        self.close()
        self._open()

    def close(self) -> None:
        self.records.close()

    def create(self, kind: JobKind = JobKind.GENERATION, tenant: str = "default", **fields: Any) -> JobRecord:
        request = fields.pop("request", {"prompt": "a cat"})
        return self.jobs.create(NewJob(kind=kind, tenant=tenant, request=request, **fields))

    def claimed(self, owner: str, kind: JobKind = JobKind.GENERATION, **fields: Any) -> JobRecord:
        self.create(kind, **fields)
        [record] = self.jobs.claim(kind, owner)
        return record

    def running(self, owner: str, kind: JobKind = JobKind.GENERATION, **fields: Any) -> JobRecord:
        return self.jobs.start(self.claimed(owner, kind, **fields).id, owner, worker_id="gpu-0")


class ScriptedLauncher:
    """A cluster in memory. Submitted jobs are PENDING until the test says otherwise in `statuses`.

    `submitted` and `stopped` list what was asked, in order. An exception in `submit_error` or `status_error` is
    raised instead of answering.
    """

    def __init__(self) -> None:
        self.statuses: dict[str, str] = {}
        self.submitted: list[str] = []
        self.stopped: list[str] = []
        self.submit_error: Exception | None = None
        self.status_error: Exception | None = None

    def submit(self, job_id: str, attempt: int) -> str:
        if self.submit_error is not None:
            raise self.submit_error
        submission_id = submission_id_for(job_id, attempt)
        assert submission_id not in self.statuses, "a cluster refuses a submission id that it knows"
        self.submitted.append(submission_id)
        self.statuses[submission_id] = "PENDING"
        return submission_id

    def status(self, submission_id: str) -> str:
        if self.status_error is not None:
            raise self.status_error
        return self.statuses.get(submission_id, "UNKNOWN")

    def stop(self, submission_id: str) -> None:
        self.stopped.append(submission_id)
