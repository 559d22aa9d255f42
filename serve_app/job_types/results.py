"""What a record's output looks like to a client, at whatever point the work is."""

from __future__ import annotations

from typing import Any

from serve_app.job_types.context import Services, is_accepted_only
from serve_app.job_types.files import redirect_item
from serve_app.job_types.process_object import error_text, process_object, process_status
from storage.job_record import JobRecord
from storage.job_state import JobKind, JobState

LIVE_FIELDS = ("progress", "step", "total_steps", "eta", "elapsed_time", "metrics")
TRAINING_FACTS = ("base_model", "trigger_word", "steps", "final_loss")


def accepted_message(record: JobRecord) -> dict[str, Any]:
    """What a process answers at once: `{process_id, status, message}`."""
    kind = "Training" if record.kind is JobKind.TRAINING else "Generation"
    return {"process_id": record.id, "status": process_status(record), "message": f"{kind} {record.id} was accepted"}


async def presented_output(services: Services, record: JobRecord) -> dict[str, Any] | None:
    """Keys become URLs here and only here. None while the job is queued. Raises StorageError."""
    if is_accepted_only(record):
        return accepted_message(record)
    if record.state is JobState.QUEUED:
        return None
    about = {"process_id": record.id, "status": process_status(record)}
    if record.state is JobState.COMPLETED:
        return {**about, **await _completed(services, record)}
    if not record.state.is_terminal:
        live = process_object(record, services.keys_of(record.tenant), services.bucket, services.clock())
        return {**about, **{name: live[name] for name in LIVE_FIELDS}}
    if record.state is JobState.CANCELLED:
        return {**about, "message": "cancelled"}
    failure: dict[str, Any] = {**about, "error": error_text(record)}
    failure["error_type"] = record.error.code if record.error is not None else record.state.value.lower()
    if record.state is JobState.TIMED_OUT:
        failure["timeout"] = True
    return failure


async def _completed(services: Services, record: JobRecord) -> dict[str, Any]:
    output = record.output or {}
    expires_s = services.limits.url_expires_s
    if record.kind is JobKind.GENERATION:
        images = output.get("images", [])
        return {"images": [await redirect_item(services.store, image, expires_s=expires_s) for image in images]}
    facts = {name: output.get(name) for name in TRAINING_FACTS}
    loras = [await redirect_item(services.store, item, expires_s=expires_s) for item in output.get("loras", [])]
    samples = [await redirect_item(services.store, item, expires_s=expires_s) for item in output.get("samples", [])]
    return {"message": "Training completed", **facts, "loras": loras, "samples": samples}
