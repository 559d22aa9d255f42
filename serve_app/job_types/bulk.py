"""Files of many processes at once: `bulk_download` and `delete_results`."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from serve_app.errors import ProcessNotFound
from serve_app.job_types.context import Finished, JobContext, Services
from serve_app.job_types.files import url_item
from serve_app.job_types.stored_files import all_below
from serve_app.validation.validator import parse_payload
from storage.errors import IllegalTransition, JobNotFound
from storage.job_record import JobRecord
from storage.jobs import Jobs

PROCESSES_MAX = 50
# What a kind of result is called among a process's objects, and in its record.
RESULTS: dict[str, tuple[str, str]] = {
    "lora": ("lora", "loras"),
    "samples": ("samples", "samples"),
    "images": ("images", "images"),
}
DELETE_BATCH = 1000


class BulkDownload(BaseModel):
    model_config = ConfigDict(extra="allow")

    process_ids: list[str] = Field(min_length=1, max_length=PROCESSES_MAX)
    include_images: bool = True
    include_loras: bool = True


class DeleteResults(BaseModel):
    model_config = ConfigDict(extra="allow")

    result_type: Literal["lora", "samples", "images"]
    process_id: str | None = Field(default=None, min_length=1, max_length=200)


async def bulk_download(services: Services, context: JobContext, payload: dict[str, Any]) -> Finished:
    """Every file by its URL, and all of them as one zip. Raises InvalidRequest, ProcessNotFound, StorageError."""
    request = parse_payload(BulkDownload, payload)
    files: list[dict[str, Any]] = []
    for process_id in dict.fromkeys(request.process_ids):
        files += _files(await _record(services, context.tenant, process_id), request)
    items = [{**url_item(stored), "type": stored["type"], "process_id": stored["process_id"]} for stored in files]
    bundle = await services.validation.bundle(context.tenant, files) if files else None
    zip_url = None if bundle is None else url_item(bundle)["url"]
    return Finished(
        {
            "download_items": items,
            "zip_url": zip_url,
            "total_files": len(items),
            "total_size": sum(stored.get("size_bytes") or 0 for stored in files),
        }
    )


async def delete_results(services: Services, context: JobContext, payload: dict[str, Any]) -> Finished:
    """Of one process, or of all that have ended; work under way keeps its files. `found` counts what there was.

    Raises InvalidRequest, ProcessNotFound, StorageError, JobError.
    """
    request = parse_payload(DeleteResults, payload)
    tenant, (folder, listed_as) = context.tenant, RESULTS[request.result_type]
    keys = services.keys_of(tenant)
    prefix = f"{keys.tenant_prefix}processes/"
    if request.process_id is not None:
        await _record(services, tenant, request.process_id)
        prefix = keys.process_prefix(request.process_id)
    found: dict[str, list[str]] = defaultdict(list)
    async for info in all_below(services, prefix):
        process_id, kind = info.key.removeprefix(f"{keys.tenant_prefix}processes/").split("/")[:2]
        if kind == folder:
            found[process_id].append(info.key)
    deleted = 0
    for process_id, doomed in found.items():
        if await _let_go(services, tenant, process_id, listed_as):
            for start in range(0, len(doomed), DELETE_BATCH):
                deleted += await services.store.delete_many(doomed[start : start + DELETE_BATCH])
    return Finished(
        {
            "status": "completed",
            "result_type": request.result_type,
            "deleted": deleted,
            "found": sum(len(doomed) for doomed in found.values()),
        }
    )


async def _let_go(services: Services, tenant: str, process_id: str, listed_as: str) -> bool:
    """Take the files out of the record first: what a record lists exists. False while the work is under way."""
    try:
        await services.jobs.call(Jobs.drop_outputs, process_id, (listed_as,), tenant=tenant)
    except IllegalTransition:
        return False
    except JobNotFound:
        # Files whose record is gone belong to nobody else: they lie in this tenant's folder.
        return True
    return True


async def _record(services: Services, tenant: str, process_id: str) -> JobRecord:
    """Raises ProcessNotFound."""
    try:
        return await services.jobs.get(process_id, tenant=tenant)
    except JobNotFound:
        raise ProcessNotFound from None


def _files(record: JobRecord, request: BulkDownload) -> list[dict[str, Any]]:
    output = record.output or {}
    chosen: list[tuple[str, str]] = []
    if request.include_loras:
        chosen.append(("lora", "loras"))
    if request.include_images:
        chosen += [("image", "images"), ("sample", "samples")]
    return [
        {
            "key": item["key"],
            "filename": str(item.get("filename") or item["key"].rsplit("/", 1)[-1]),
            "size_bytes": item.get("size_bytes"),
            "sha256": item.get("sha256"),
            "type": kind,
            "process_id": record.id,
        }
        for kind, listed_as in chosen
        for item in output.get(listed_as, [])
        if item.get("key")
    ]
