"""The record that answers for a RunPod job."""

from __future__ import annotations

from serve_app.collaborators import JobsApi
from serve_app.job_types.context import ACCEPTED_PREFIX, public_runpod_id
from storage.errors import JobNotFound
from storage.job_record import JobRecord


async def find_record(jobs: JobsApi, tenant: str, runpod_id: str) -> JobRecord | None:
    """None where there is none, or another tenant's. Raises JobError where the records cannot be read."""
    for name in (runpod_id, f"{ACCEPTED_PREFIX}{runpod_id}"):
        try:
            record = await jobs.get_by_runpod_id(name, tenant=tenant)
        except JobNotFound:
            continue
        # An id that spells out the prefix is not one that was given to anybody.
        return record if public_runpod_id(record) == runpod_id else None
    return None
