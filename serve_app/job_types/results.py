"""What a record's output looks like to a client, at whatever point the work is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from serve_app.collaborators import Clock
from serve_app.job_types.context import is_accepted_only
from serve_app.job_types.files import redirect_item
from serve_app.job_types.process_object import error_text, live_fields, process_status
from serve_app.settings import RequestLimits
from storage.job_record import JobRecord
from storage.job_state import JobKind, JobState
from storage.keys import Keys
from storage.objects import ObjectStore

TRAINING_FACTS = ("base_model", "trigger_word", "steps", "final_loss")
PREVIEWS = "previews"
NOT_SHOWN = frozenset({PREVIEWS, "logs"})
"""In a report: object keys."""


class Presenting(Protocol):
    """What it takes to show a record; `serve_app.job_types.context.Services` has it."""

    @property
    def store(self) -> ObjectStore: ...
    @property
    def clock(self) -> Clock: ...
    @property
    def bucket(self) -> str: ...
    @property
    def limits(self) -> RequestLimits: ...
    def keys_of(self, tenant: str) -> Keys: ...


@dataclass(frozen=True)
class Presenter:
    """`Presenting` where there are no Services."""

    store: ObjectStore
    clock: Clock
    bucket: str
    prefix: str
    limits: RequestLimits

    def keys_of(self, tenant: str) -> Keys:
        """Raises InvalidKey for a tenant whose name cannot be part of a key."""
        return Keys(self.prefix, tenant)


def accepted_message(record: JobRecord) -> dict[str, Any]:
    """What a process answers at once: `{process_id, status, message}` and the record's notes."""
    kind = "Training" if record.kind is JobKind.TRAINING else "Generation"
    return {**_about(record), "message": f"{kind} {record.id} was accepted"}


def _about(record: JobRecord) -> dict[str, Any]:
    return {"process_id": record.id, "status": process_status(record), **(record.notes or {})}


async def presented_output(services: Presenting, record: JobRecord) -> dict[str, Any] | None:
    """Keys become URLs here and only here. None while the job is queued. Raises StorageError."""
    if is_accepted_only(record):
        return accepted_message(record)
    if record.state is JobState.QUEUED:
        return None
    about = _about(record)
    if record.state is JobState.COMPLETED:
        return {**about, **await _completed(services, record)}
    if not record.state.is_terminal:
        shown = live_fields(record, services.clock())
        return {**about, **shown, **await presented_previews(services, record.progress)}
    if record.state is JobState.CANCELLED:
        return {**about, "message": "cancelled"}
    failure: dict[str, Any] = {**about, "error": error_text(record)}
    failure["error_type"] = record.error.code if record.error is not None else record.state.value.lower()
    if record.state is JobState.TIMED_OUT:
        failure["timeout"] = True
    return failure


async def presented_event(services: Presenting, data: dict[str, Any]) -> dict[str, Any]:
    """A report of progress as its chunk of the stream: pictures by URL. Raises StorageError."""
    plain = {name: value for name, value in data.items() if name not in NOT_SHOWN}
    return {"event": "progress", **plain, **await presented_previews(services, data)}


async def presented_previews(services: Presenting, progress: dict[str, Any]) -> dict[str, Any]:
    """`preview` is the newest one's URL; nothing where there is none."""
    made = [item for item in progress.get(PREVIEWS, []) if item.get("key")]
    if not made:
        return {}
    shown = [await redirect_item(services.store, item, expires_s=services.limits.url_expires_s) for item in made]
    return {"preview": shown[-1]["url"], PREVIEWS: shown}


async def _completed(services: Presenting, record: JobRecord) -> dict[str, Any]:
    output = record.output or {}
    expires_s = services.limits.url_expires_s
    if record.kind is JobKind.GENERATION:
        images = output.get("images", [])
        return {"images": [await redirect_item(services.store, image, expires_s=expires_s) for image in images]}
    facts = {name: output.get(name) for name in TRAINING_FACTS}
    loras = [await redirect_item(services.store, item, expires_s=expires_s) for item in output.get("loras", [])]
    samples = [await redirect_item(services.store, item, expires_s=expires_s) for item in output.get("samples", [])]
    more: dict[str, Any] = {"best_step": output["best_step"]} if output.get("best_step") is not None else {}
    if output.get("warnings"):
        more["warnings"] = [*(record.notes or {}).get("warnings", []), *output["warnings"]]
    if output.get("exports"):
        more["exports"] = [await redirect_item(services.store, e, expires_s=expires_s) for e in output["exports"]]
    return {"message": "Training completed", **facts, "loras": loras, "samples": samples, **more}
