"""A record's whole status object, with its output as clients see it."""

from __future__ import annotations

from typing import Any

from serve_app.ingress.runpod_view import execution_ms, record_view, stamped
from serve_app.job_types.context import public_runpod_id
from serve_app.job_types.results import Presenting, presented_output
from storage.job_record import JobRecord


async def status_object(services: Presenting, record: JobRecord, request_id: str) -> dict[str, Any]:
    """Raises StorageError where URLs cannot be made."""
    now = services.clock()
    output = await presented_output(services, record)
    if output is not None:
        output = stamped(
            output,
            request_id=request_id,
            worker_id=record.worker_id,
            runpod_id=public_runpod_id(record),
            duration_ms=execution_ms(record, now),
            timestamp=record.finished_at or now,
        )
    return record_view(record, now, output)
