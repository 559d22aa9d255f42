"""How a job's record is changed: one step in one transaction, and told of once it is committed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeAlias

from storage.job_record import JobRecord
from storage.job_streams import visible
from storage.records import Records

JobList: TypeAlias = list[JobRecord]
Step: TypeAlias = Callable[[JobRecord], JobRecord]


@dataclass(frozen=True)
class JobsPolicy:
    """`cancel_grace_s` and `timeout_grace_s` are what an owner gets to save its work and settle the job itself."""

    cancel_grace_s: float = 120.0
    timeout_grace_s: float = 60.0
    idempotency_ttl_s: float = 24 * 3600.0
    events_kept_s: float = 24 * 3600.0


class JobChanges:
    """Part of `Jobs`: what its other parts change records by."""

    _records: Records
    _policy: JobsPolicy
    _clock: Callable[[], datetime]
    on_change: Callable[[JobRecord], None] | None

    def _change(
        self,
        operation: str,
        job_id: str,
        step: Step,
        *,
        submission_id: str | None = None,
        events: Sequence[dict[str, Any]] = (),
    ) -> JobRecord:
        with self._records.write(operation) as tx:
            before = visible(tx.get(job_id, lock=True), job_id, None)
            after = step(before)
            if after is not before:
                tx.save(after)
                tx.add_events(job_id, after.updated_at, events)
            if submission_id is not None:
                tx.open_submission(submission_id, job_id)
        if after is not before:
            self._announce([after])
        return after

    def _announce(self, records: Sequence[JobRecord]) -> None:
        if self.on_change is not None:
            for record in records:
                self.on_change(record)
