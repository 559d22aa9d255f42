"""What a record's output looks like to a client, at whatever point the work is."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol

from serve_app.collaborators import Clock
from serve_app.job_types.context import is_accepted_only
from serve_app.job_types.files import redirect_item
from serve_app.job_types.process_object import error_text, live_fields, process_status
from serve_app.links import signed
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
    """None while the job is queued. Raises StorageError."""
    if is_accepted_only(record):
        return accepted_message(record)
    if record.state is JobState.QUEUED:
        return None
    return await _signed(services, {**_about(record), **_shown(record, services.clock())})


def _shown(record: JobRecord, now: datetime) -> dict[str, Any]:
    if record.state is JobState.COMPLETED:
        return _completed(record)
    if not record.state.is_terminal:
        return {**live_fields(record, now), **_previews(record.progress)}
    if record.state is JobState.CANCELLED:
        return {"message": "cancelled"}
    code = record.error.code if record.error is not None else record.state.value.lower()
    failure: dict[str, Any] = {"error": error_text(record), "error_type": code}
    if record.state is JobState.TIMED_OUT:
        failure["timeout"] = True
    return failure


async def presented_event(services: Presenting, data: dict[str, Any]) -> dict[str, Any]:
    """A report of progress as its chunk of the stream: pictures by URL. Raises StorageError."""
    plain = {name: value for name, value in data.items() if name not in NOT_SHOWN}
    return await _signed(services, {"event": "progress", **plain, **_previews(data)})


def _previews(progress: dict[str, Any]) -> dict[str, Any]:
    """`preview` is the newest one's URL; nothing where there is none."""
    shown = [redirect_item(item) for item in progress.get(PREVIEWS, []) if item.get("key")]
    return {"preview": shown[-1]["url"], PREVIEWS: shown} if shown else {}


def _completed(record: JobRecord) -> dict[str, Any]:
    output = record.output or {}
    if record.kind is JobKind.GENERATION:
        return {"images": [redirect_item(image) for image in output.get("images", [])]}
    facts = {name: output.get(name) for name in TRAINING_FACTS}
    files = {name: [redirect_item(item) for item in output.get(name, [])] for name in ("loras", "samples")}
    more: dict[str, Any] = {"best_step": output["best_step"]} if output.get("best_step") is not None else {}
    if output.get("warnings"):
        more["warnings"] = [*(record.notes or {}).get("warnings", []), *output["warnings"]]
    if output.get("exports"):
        more["exports"] = [redirect_item(item) for item in output["exports"]]
    return {"message": "Training completed", **facts, **files, **more}


async def _signed(services: Presenting, output: dict[str, Any]) -> dict[str, Any]:
    return await signed(services.store, output, expires_s=services.limits.url_expires_s)
