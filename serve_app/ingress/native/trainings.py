"""`/v1/trainings`: create, list, read, follow, cancel, resume."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import Response, StreamingResponse
from fastapi.routing import APIRoute

from serve_app.ingress.native.bodies import TrainingContinue, TrainingCreate, reads, takes
from serve_app.ingress.native.calls import check_id, context_of, record_of, tenant_of
from serve_app.ingress.native.events import EventStream, last_event_id, version_of
from serve_app.ingress.native.views import Page, State, Training, TrainingAccepted, training_view
from serve_app.ingress.native.waiting import Waited
from serve_app.job_types.context import Services
from serve_app.job_types.continuing import continue_from
from serve_app.job_types.train import queue_training
from storage.job_state import JobKind, JobState

TRAINING = JobKind.TRAINING
PAGE_MAX = 200
Replies = dict[int | str, dict[str, Any]]
_TEXT = {"schema": {"type": "string"}}
EVENT_STREAM: Replies = {200: {"description": "Server-sent events.", "content": {"text/event-stream": _TEXT}}}
NO_MORE: Replies = {204: {"description": "The training has ended and its last event was seen."}}

Limit = Annotated[int, Query(ge=1, le=PAGE_MAX)]
Cursor = Annotated[str | None, Query(max_length=500)]


def trainings_router(services: Services, route_class: type[APIRoute]) -> APIRouter:
    router = APIRouter(prefix="/v1/trainings", tags=["trainings"], route_class=route_class)

    @router.post("", status_code=202, openapi_extra=takes(TrainingCreate))
    async def create_training(
        request: Request, asked: Annotated[TrainingCreate, Depends(reads(TrainingCreate))]
    ) -> TrainingAccepted:
        """Queue a training. Its configuration is checked as a whole before anything is queued."""
        if asked.config is not None:
            plan = await services.validation.training(asked.config)
        else:
            spec = asked.model_dump(mode="json", include={"spec"})["spec"]
            plan = await services.validation.training_spec(spec)
        queued = await queue_training(services, await context_of(request, asked.policy()), plan, waits=True)
        return TrainingAccepted(
            training=training_view(queued.record, services.clock()),
            ignored=list(plan.ignored),
            warnings=list(plan.warnings),
        )

    @router.get("")
    async def list_trainings(
        request: Request, state: State | None = None, limit: Limit = 50, cursor: Cursor = None
    ) -> Page[Training]:
        """The tenant's trainings, newest first, a page at a time."""
        states = None if state is None else (JobState(state),)
        page = await services.jobs.list(tenant_of(request), kind=TRAINING, states=states, limit=limit, cursor=cursor)
        now = services.clock()
        return Page(items=[training_view(record, now) for record in page.records], next_cursor=page.next_cursor)

    @router.get("/{training_id}")
    async def get_training(request: Request, training_id: str, wait: Waited = 0.0) -> Training:
        """One training. With `wait`, answers when it has ended, or after so many seconds."""
        record = await record_of(services, request, training_id, TRAINING)
        if wait > 0 and not record.state.is_terminal:
            record = await services.jobs.wait(record.id, tenant=record.tenant, timeout_s=wait)
        return training_view(record, services.clock())

    @router.get("/{training_id}/events", response_class=StreamingResponse, responses=EVENT_STREAM | NO_MORE)
    async def training_events(request: Request, training_id: str) -> Response:
        """Follow a training: `state` and `progress` events, each with the training as data, until it has ended.

        `Last-Event-ID` goes on behind that event; 204 says that nothing will follow it.
        """
        record = await record_of(services, request, training_id, TRAINING)
        seen = last_event_id(request)
        if record.state.is_terminal and seen is not None and seen >= version_of(record):
            return Response(status_code=204)
        stream = EventStream(services, lambda found: training_view(found, services.clock()))
        return stream.response(record, seen)

    @router.post("/{training_id}/cancel", status_code=202)
    async def cancel_training(request: Request, training_id: str) -> Training:
        """Ask it to stop: at once while it is queued, else after its next step, with a checkpoint kept."""
        check_id(training_id, TRAINING)
        record = await services.jobs.request_cancel(training_id, tenant=tenant_of(request))
        return training_view(record, services.clock())

    @router.post("/{training_id}/resume", status_code=202)
    async def resume_training(request: Request, training_id: str) -> Training:
        """Queue a training again that failed or timed out; it goes on from its newest checkpoint."""
        check_id(training_id, TRAINING)
        record = await services.jobs.retry(training_id, tenant=tenant_of(request))
        return training_view(record, services.clock())

    @router.post("/{training_id}/continue", status_code=202, openapi_extra=takes(TrainingContinue))
    async def continue_training(
        request: Request, training_id: str, asked: Annotated[TrainingContinue, Depends(reads(TrainingContinue))]
    ) -> TrainingAccepted:
        """Queue a new training that goes on from the newest checkpoint of one that has ended, however it ended.

        It has that one's configuration, data and optimizer state. For more steps of a completed training, or the rest
        of a cancelled one.
        """
        record = await record_of(services, request, training_id, TRAINING)
        context = await context_of(request, asked.policy())
        queued = await continue_from(services, context, record, asked.steps)
        return TrainingAccepted(training=training_view(queued.record, services.clock()), ignored=[], warnings=[])

    return router
