"""`/v1/loras`: the adapters that trainings made, and those brought in from elsewhere."""

from __future__ import annotations

import re
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from fastapi.routing import APIRoute

from serve_app.ingress.native.bodies import LoraImportCreate, reads, takes
from serve_app.ingress.native.calls import tenant_of
from serve_app.ingress.native.once import Renew
from serve_app.ingress.native.trainings import Cursor, Limit
from serve_app.ingress.native.views import (
    Download,
    Lora,
    LoraFileView,
    LoraImportStarted,
    LoraUpload,
    Page,
)
from serve_app.job_types.context import Services
from serve_app.job_types.files import latest_lora
from storage.errors import InvalidCursor, JobNotFound, ObjectNotFound
from storage.imported_loras import (
    IMPORTED_ID_PATTERN,
    ImportedLora,
    ImportedLoraNotFound,
    LoraImport,
    delete_imported,
    list_imported,
    new_lora_id,
    read_imported,
    staged_file,
    write_import,
)
from storage.job_record import JOB_ID_PATTERN, JobRecord
from storage.job_state import JobKind, JobState
from storage.jobs import Jobs

IMPORT_CURSOR = "import."
CONTENT_TYPE = "application/octet-stream"
FILE_FIELDS = ("filename", "size_bytes", "sha256", "format", "step")
_IMPORTED_ID = re.compile(IMPORTED_ID_PATTERN)
_JOB_ID = re.compile(JOB_ID_PATTERN)

Filename = Annotated[str | None, Query(max_length=200, description="Which of its files; the furthest trained if open.")]


def loras_router(services: Services, route_class: type[APIRoute]) -> APIRouter:
    router = APIRouter(prefix="/v1/loras", tags=["loras"], route_class=route_class)

    @router.get("")
    async def list_loras(request: Request, limit: Limit = 50, cursor: Cursor = None) -> Page[Lora]:
        """Imported adapters, newest first, then those of trainings, newest first.

        A page may be shorter than `limit`, where adapters were deleted.
        """
        tenant = tenant_of(request)
        after = _place_among_imports(cursor)
        imported: list[ImportedLora] = []
        if cursor is None or after is not None:
            every = await list_imported(services.store, services.keys_of(tenant))
            imported = [lora for lora in every if after is None or _place(lora) < after]
            cursor = None
        shown = imported[:limit]
        if len(shown) == limit:
            return Page(items=[*map(_imported, shown)], next_cursor=_cursor_after(shown[-1]))
        page = await services.jobs.list(
            tenant, kind=JobKind.TRAINING, states=(JobState.COMPLETED,), limit=limit - len(shown), cursor=cursor
        )
        trained = [_trained(record) for record in page.records if _files_of(record)]
        return Page(items=[*map(_imported, shown), *trained], next_cursor=page.next_cursor)

    @router.post("/import", status_code=201, openapi_extra=takes(LoraImportCreate))
    async def import_lora(
        request: Request, asked: Annotated[LoraImportCreate, Depends(reads(LoraImportCreate))]
    ) -> LoraImportStarted:
        """Begin an import: the reply says where the file goes. POST /v1/loras/{id}/finish then makes it an adapter."""
        keys, now = services.keys_of(tenant_of(request)), services.clock()
        started = LoraImport(id=new_lora_id(), created_at=now, **asked.model_dump())
        await write_import(services.store, keys, started)
        upload = await _upload_to(services, staged_file(keys, started))
        return LoraImportStarted(id=started.id, upload=upload)

    @router.post("/{lora_id}/finish", status_code=201)
    async def finish_lora_import(request: Request, lora_id: str) -> Lora:
        """Check the uploaded file: its size, its sha256 where one was promised, and its header."""
        if not _IMPORTED_ID.match(lora_id):
            raise ImportedLoraNotFound(lora_id[:100])
        return _imported(await services.validation.finish_lora_import(tenant_of(request), lora_id))

    @router.get("/{lora_id}")
    async def get_lora(request: Request, lora_id: str) -> Lora:
        """One adapter."""
        found = await _found(services, tenant_of(request), lora_id)
        return _imported(found) if isinstance(found, ImportedLora) else _trained(found)

    @router.get("/{lora_id}/download")
    async def download_lora(request: Request, lora_id: str, filename: Filename = None) -> Download:
        """A URL for one of the adapter's files."""
        found = await _found(services, tenant_of(request), lora_id)
        stored = found.model_dump() if isinstance(found, ImportedLora) else _chosen(found, filename)
        if filename not in (None, stored["filename"]):
            raise ObjectNotFound(str(stored["key"]))
        expires_s = services.limits.url_expires_s
        url = await services.store.presign_get(stored["key"], expires_s=expires_s, filename=stored["filename"])
        return Download(
            filename=stored["filename"],
            url=url,
            size_bytes=stored.get("size_bytes"),
            sha256=stored.get("sha256"),
            content_type=CONTENT_TYPE,
            expires_at=services.clock() + timedelta(seconds=expires_s),
        )

    @router.delete("/{lora_id}", status_code=204)
    async def delete_lora(request: Request, lora_id: str) -> None:
        """Delete an adapter's files. The record of the training that made it stays."""
        tenant = tenant_of(request)
        found = await _found(services, tenant, lora_id)
        if isinstance(found, ImportedLora):
            await delete_imported(services.store, services.keys_of(tenant), lora_id)
            return
        keys = [str(stored["key"]) for stored in _files_of(found)]
        # The record first: what is listed exists.
        await services.jobs.call(Jobs.drop_outputs, found.id, ("loras",), tenant=tenant)
        await services.store.delete_many(keys)

    return router


async def _upload_to(services: Services, key: str) -> LoraUpload:
    expires_s = services.limits.url_expires_s
    url = await services.store.presign_put(key, expires_s=expires_s, content_type=CONTENT_TYPE)
    expires_at = services.clock() + timedelta(seconds=expires_s)
    return LoraUpload(url=url, headers={"Content-Type": CONTENT_TYPE}, expires_at=expires_at)


def renewed_lora_import(services: Services) -> Renew:
    async def renew(tenant: str, kept: dict[str, Any], asked: dict[str, Any]) -> dict[str, Any]:
        key = services.keys_of(tenant).staging_file(kept["id"], asked["filename"])
        upload = await _upload_to(services, key)
        return kept | {"upload": upload.model_dump(mode="json")}

    return renew


def _place(lora: ImportedLora) -> tuple[datetime, str]:
    return lora.created_at, lora.id


def _cursor_after(lora: ImportedLora) -> str:
    """Unlike any cursor of records, so that a page knows in which of the two lists it goes on."""
    return f"{IMPORT_CURSOR}{urlsafe_b64encode(f'{lora.created_at.isoformat()} {lora.id}'.encode()).decode()}"


def _place_among_imports(cursor: str | None) -> tuple[datetime, str] | None:
    """Where the page before ended, None where that was not among imports. Raises InvalidCursor."""
    if cursor is None or not cursor.startswith(IMPORT_CURSOR):
        return None
    try:
        created_at, lora_id = urlsafe_b64decode(cursor.removeprefix(IMPORT_CURSOR).encode()).decode().split(" ")
        return datetime.fromisoformat(created_at).astimezone(UTC), lora_id
    except (ValueError, OverflowError) as error:
        raise InvalidCursor from error


async def _found(services: Services, tenant: str, lora_id: str) -> ImportedLora | JobRecord:
    """Raises ImportedLoraNotFound for what is no adapter of this tenant."""
    if _IMPORTED_ID.match(lora_id):
        return await read_imported(services.store, services.keys_of(tenant), lora_id)
    if not _JOB_ID.match(lora_id):
        raise ImportedLoraNotFound(lora_id[:100])
    try:
        record = await services.jobs.get(lora_id, tenant=tenant)
    except JobNotFound:
        raise ImportedLoraNotFound(lora_id) from None
    if record.kind is not JobKind.TRAINING or record.state is not JobState.COMPLETED or not _files_of(record):
        raise ImportedLoraNotFound(lora_id)
    return record


def _files_of(record: JobRecord) -> list[dict[str, Any]]:
    return [item for item in (record.output or {}).get("loras", []) if item.get("key")]


def _chosen(record: JobRecord, filename: str | None) -> dict[str, Any]:
    """Raises ObjectNotFound."""
    if filename is None:
        best = latest_lora(record.output)
        if best is not None:
            return _named(best)
    for stored in map(_named, _files_of(record)):
        if stored["filename"] == filename:
            return stored
    raise ObjectNotFound(record.id)


def _named(stored: dict[str, Any]) -> dict[str, Any]:
    return {**stored, "filename": stored.get("filename") or str(stored["key"]).rsplit("/", 1)[-1]}


def _trained(record: JobRecord) -> Lora:
    output = record.output or {}
    return Lora(
        id=record.id,
        name=str(record.request.get("name") or record.id),
        source="training",
        training_id=record.id,
        base_model=output.get("base_model"),
        trigger_word=output.get("trigger_word"),
        rank=(record.request.get("network") or {}).get("rank"),
        created_at=record.finished_at or record.updated_at,
        files=_file_views(_files_of(record)),
    )


def _imported(lora: ImportedLora) -> Lora:
    return Lora(
        id=lora.id,
        name=lora.name,
        source="import",
        base_model=lora.base_model,
        trigger_word=lora.trigger_word,
        rank=lora.rank,
        created_at=lora.created_at,
        files=_file_views([lora.model_dump()]),
        warnings=list(lora.warnings),
    )


def _file_views(stored: Iterable[dict[str, Any]]) -> list[LoraFileView]:
    return [LoraFileView(**{name: item.get(name) for name in FILE_FIELDS}) for item in map(_named, stored)]
