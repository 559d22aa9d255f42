"""`list_models` and `download`: the adapters that trainings made, and the files of a process."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from serve_app.errors import ProcessFilesDeleted, ProcessNotCompleted, ProcessNotFound
from serve_app.job_types.context import Finished, JobContext, Services
from serve_app.job_types.files import latest_lora, url_item
from serve_app.job_types.processes import ProcessChoice
from serve_app.validation.validator import parse_payload
from storage.errors import JobNotFound
from storage.imported_loras import ImportedLora, list_imported
from storage.job_record import JobRecord
from storage.job_state import JobKind, JobState

PAGE_RECORDS = 200
MIB = 1024 * 1024


async def stored_loras(services: Services, tenant: str) -> AsyncIterator[tuple[JobRecord, dict[str, Any]]]:
    """Every adapter of the tenant's completed trainings with its record, newest training first, all pages."""
    cursor: str | None = None
    while True:
        page = await services.jobs.list(
            tenant, kind=JobKind.TRAINING, states=(JobState.COMPLETED,), limit=PAGE_RECORDS, cursor=cursor
        )
        for record in page.records:
            for stored in (record.output or {}).get("loras", []):
                if stored.get("key"):
                    yield record, stored
        cursor = page.next_cursor
        if cursor is None:
            return


async def list_models(services: Services, context: JobContext, payload: dict[str, Any]) -> Finished:
    """The adapters that were trained here, newest first, then those that were brought in."""
    models = [_model(services, record, stored) async for record, stored in stored_loras(services, context.tenant)]
    imported = await list_imported(services.store, services.keys_of(context.tenant))
    models += [_imported_model(services, lora) for lora in imported]
    return Finished({"models": models, "total": len(models)})


async def download(services: Services, context: JobContext, payload: dict[str, Any]) -> Finished:
    """A training's furthest trained adapter, or a generation's first picture; `files` has all of them.

    Raises ProcessNotFound, ProcessNotCompleted, ProcessFilesDeleted, InvalidRequest, StorageError.
    """
    request = parse_payload(ProcessChoice, payload)
    try:
        record = await services.jobs.get(request.process_id, tenant=context.tenant)
    except JobNotFound:
        raise ProcessNotFound from None
    if record.state is not JobState.COMPLETED:
        raise ProcessNotCompleted
    files = _files(record)
    if not files:
        raise ProcessFilesDeleted
    items = [url_item(stored) for stored in files]
    return Finished({**items[0], "process_id": record.id, "files": items})


def _files(record: JobRecord) -> list[dict[str, Any]]:
    """The files of a completed process, the one that `download` means first."""
    output = record.output or {}
    if record.kind is JobKind.GENERATION:
        return [item for item in output.get("images", []) if item.get("key")]
    best = latest_lora(output)
    return [] if best is None else [best, *(item for item in output["loras"] if item.get("key") and item is not best)]


def _imported_model(services: Services, lora: ImportedLora) -> dict[str, Any]:
    return {
        "id": lora.id,
        "filename": lora.filename,
        "name": lora.name,
        "path": f"s3://{services.bucket}/{lora.key}",
        "s3_key": lora.key,
        "process_id": None,
        "size_mb": round(lora.size_bytes / MIB, 2),
        "modified_date": lora.created_at.isoformat(),
        "status": "ready",
        "trigger_word": lora.trigger_word,
        "base_model": lora.base_model,
        "step": None,
        "format": lora.format,
    }


def _model(services: Services, record: JobRecord, stored: dict[str, Any]) -> dict[str, Any]:
    output = record.output or {}
    filename = str(stored.get("filename") or stored["key"].rsplit("/", 1)[-1])
    size_bytes = stored.get("size_bytes") or 0
    return {
        "id": stored.get("id") or record.id,
        "filename": filename,
        "name": str(record.request.get("name") or filename.removesuffix(".safetensors")),
        "path": f"s3://{services.bucket}/{stored['key']}",
        "s3_key": stored["key"],
        "process_id": record.id,
        "size_mb": round(size_bytes / MIB, 2),
        "modified_date": (record.finished_at or record.updated_at).isoformat(),
        "status": "ready",
        "trigger_word": output.get("trigger_word"),
        "base_model": output.get("base_model"),
        "step": stored.get("step"),
        "format": stored.get("format"),
    }
