"""`processes`, `process_status`, `cancel`: the job records as the older API speaks of them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from serve_app.errors import ProcessNotCancellable
from serve_app.job_types.context import Finished, JobContext, Services
from serve_app.job_types.process_object import OLDER_STATUS, process_object
from serve_app.validation.validator import parse_payload
from storage.errors import JobNotCancellable, JobNotFound
from storage.job_state import JobKind

OlderStatus = Literal["starting", "running", "completed", "failed", "cancelled"]


class ProcessChoice(BaseModel):
    model_config = ConfigDict(extra="allow")

    process_id: str = Field(min_length=1, max_length=200)


class ProcessesPayload(BaseModel):
    """`process_type` chooses trainings or generations, since `type` in the input is the job type itself."""

    model_config = ConfigDict(extra="allow")

    status: OlderStatus | None = None
    process_type: Literal["training", "generation"] | None = None
    limit: int = Field(default=50, ge=1, le=200)
    cursor: str | None = Field(default=None, max_length=500)


async def processes(services: Services, context: JobContext, payload: dict[str, Any]) -> Finished:
    """One page, newest first; `next_cursor` leads to the next one until it is None."""
    request = parse_payload(ProcessesPayload, payload)
    states = None
    if request.status is not None:
        states = [state for state, name in OLDER_STATUS.items() if name == request.status]
    page = await services.jobs.list(
        context.tenant,
        kind=None if request.process_type is None else JobKind(request.process_type),
        states=states,
        limit=request.limit,
        cursor=request.cursor,
    )
    keys, now = services.keys_of(context.tenant), services.clock()
    return Finished(
        {
            "processes": [process_object(record, keys, services.bucket, now) for record in page.records],
            "next_cursor": page.next_cursor,
            "worker_id": services.worker_id,
            "environment": services.environment,
            "data_sources": ["records"],
        }
    )


async def process_status(services: Services, context: JobContext, payload: dict[str, Any]) -> Finished:
    request = parse_payload(ProcessChoice, payload)
    try:
        record = await services.jobs.get(request.process_id, tenant=context.tenant)
    except JobNotFound:
        return Finished({"process_id": request.process_id, "status": "not_found"})
    return Finished(process_object(record, services.keys_of(context.tenant), services.bucket, services.clock()))


async def cancel(services: Services, context: JobContext, payload: dict[str, Any]) -> Finished:
    """Raises ProcessNotCancellable. Work under way stops at its next step and keeps its last checkpoint."""
    request = parse_payload(ProcessChoice, payload)
    try:
        record = await services.jobs.request_cancel(request.process_id, tenant=context.tenant)
    except (JobNotFound, JobNotCancellable):
        raise ProcessNotCancellable from None
    ended = record.state.is_terminal
    return Finished({"message": f"Process {record.id} {'was cancelled' if ended else 'is being cancelled'}"})
