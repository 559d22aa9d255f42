"""`/v1/generations`: draw pictures, list and read them, cancel."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response, StreamingResponse
from fastapi.routing import APIRoute

from serve_app.ingress.native.bodies import GenerationCreate, reads, takes
from serve_app.ingress.native.calls import check_id, context_of, record_of, tenant_of
from serve_app.ingress.native.events import EventStream, last_event_id, version_of
from serve_app.ingress.native.once import Renew
from serve_app.ingress.native.trainings import EVENT_STREAM, NO_MORE, Cursor, Limit, Replies
from serve_app.ingress.native.views import Generation, Image, Page, State, generation_view
from serve_app.ingress.native.waiting import Waited
from serve_app.ingress.pictures import start_generation
from serve_app.job_types.context import Services
from storage.job_record import JobRecord
from storage.job_state import JobKind, JobState

GENERATION = JobKind.GENERATION
IMAGE_FIELDS = ("filename", "size_bytes", "content_type", "sha256", "seed", "width", "height", "prompt")
ENDED: Replies = {200: {"model": Generation, "description": "The generation that was waited for, ended."}}


def generations_router(services: Services, route_class: type[APIRoute]) -> APIRouter:
    router = APIRouter(prefix="/v1/generations", tags=["generations"], route_class=route_class)

    @router.post("", status_code=202, responses=ENDED, openapi_extra=takes(GenerationCreate))
    async def create_generation(
        request: Request,
        response: Response,
        asked: Annotated[GenerationCreate, Depends(reads(GenerationCreate))],
        wait: Waited = 0.0,
    ) -> Generation:
        """Queue a generation. With `wait`, answers when its pictures are there, or after so many seconds."""
        record = await start_generation(services, await context_of(request, asked.policy()), asked.payload())
        record = await _waited(services, record, wait)
        if record.state.is_terminal:
            response.status_code = 200
        return await _view(services, record)

    @router.get("")
    async def list_generations(
        request: Request, state: State | None = None, limit: Limit = 50, cursor: Cursor = None
    ) -> Page[Generation]:
        """The tenant's generations, newest first, a page at a time; their pictures' URLs only one by one."""
        states = None if state is None else (JobState(state),)
        page = await services.jobs.list(tenant_of(request), kind=GENERATION, states=states, limit=limit, cursor=cursor)
        now = services.clock()
        return Page(items=[generation_view(record, now, None) for record in page.records], next_cursor=page.next_cursor)

    @router.get("/{generation_id}")
    async def get_generation(request: Request, generation_id: str, wait: Waited = 0.0) -> Generation:
        """One generation. With `wait`, answers when it has ended, or after so many seconds."""
        record = await record_of(services, request, generation_id, GENERATION)
        return await _view(services, await _waited(services, record, wait))

    @router.get("/{generation_id}/events", response_class=StreamingResponse, responses=EVENT_STREAM | NO_MORE)
    async def generation_events(request: Request, generation_id: str) -> Response:
        """Follow a generation: `state` and `progress` events until it has ended. See the trainings' events."""
        record = await record_of(services, request, generation_id, GENERATION)
        seen = last_event_id(request)
        if record.state.is_terminal and seen is not None and seen >= version_of(record):
            return Response(status_code=204)
        stream = EventStream(services, lambda found: generation_view(found, services.clock(), None))
        return stream.response(record, seen)

    @router.post("/{generation_id}/cancel", status_code=202)
    async def cancel_generation(request: Request, generation_id: str) -> Generation:
        """Ask it to stop: at once while it is queued, else before its next denoising step."""
        check_id(generation_id, GENERATION)
        record = await services.jobs.request_cancel(generation_id, tenant=tenant_of(request))
        return generation_view(record, services.clock(), None)

    return router


async def _waited(services: Services, record: JobRecord, wait_s: float) -> JobRecord:
    if wait_s <= 0 or record.state.is_terminal:
        return record
    return await services.jobs.wait(record.id, tenant=record.tenant, timeout_s=wait_s)


async def _view(services: Services, record: JobRecord) -> Generation:
    images = await _images(services, record) if record.state is JobState.COMPLETED else None
    return generation_view(record, services.clock(), images)


async def _images(services: Services, record: JobRecord) -> list[Image]:
    stored = [item for item in (record.output or {}).get("images", []) if item.get("key")]
    return [await _image(services, item) for item in stored]


def renewed_generation(services: Services) -> Renew:
    """A reply that came before the pictures has no URLs, and stays what it was."""

    async def renew(tenant: str, kept: dict[str, Any], _: dict[str, Any]) -> dict[str, Any]:
        if kept["images"] is None:
            return kept
        record = await services.jobs.get(kept["id"], tenant=tenant)
        return kept | {"images": [image.model_dump(mode="json") for image in await _images(services, record)]}

    return renew


async def _image(services: Services, stored: dict[str, object]) -> Image:
    key, filename = str(stored["key"]), stored.get("filename")
    name = str(filename) if filename else key.rsplit("/", 1)[-1]
    url = await services.store.presign_get(key, expires_s=services.limits.url_expires_s, filename=name)
    return Image.model_validate({name: stored.get(name) for name in IMAGE_FIELDS} | {"filename": name, "url": url})
