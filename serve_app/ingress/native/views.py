"""What the routes of `/v1` answer. Times are ISO 8601 in UTC; URLs are presigned when they are asked for."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from serve_app.job_types.files import latest_lora
from serve_app.job_types.process_object import count_of, elapsed_s, error_text, progress_percent, steps_of
from storage.job_record import JobRecord
from storage.job_state import JobState

T = TypeVar("T")
State = Literal["QUEUED", "STARTING", "RUNNING", "COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT"]


class View(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class Page(View, Generic[T]):
    """Newest first; `next_cursor` leads to the next page until it is null."""

    items: list[T]
    next_cursor: str | None = None


class Progress(View):
    """`percent` 0 to 100. What is not known yet is null, as is what does not apply: `best_step` has the lowest
    validation loss; `gpu_memory_peak_bytes` is the most that a training held at once of its GPU's whole memory."""

    percent: float
    stage: str | None = None
    step: int | None = None
    total_steps: int | None = None
    loss: float | None = None
    smoothed_loss: float | None = None
    steps_per_s: float | None = None
    eta_s: float | None = None
    validation_loss: float | None = None
    best_step: int | None = None
    gpu_memory_peak_bytes: int | None = None
    gpu_memory_total_bytes: int | None = None
    message: str | None = None


class Failure(View):
    """Why the work did not complete: a stable code, and a sentence."""

    code: str
    message: str


class Job(View):
    """What every kind of work has. `attempt` counts from 1."""

    id: str
    state: State
    progress: Progress
    error: Failure | None = None
    created_at: datetime
    updated_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None
    elapsed_s: float | None = None
    attempt: int
    attempts_max: int
    cancel_requested: bool


class TrainingResult(View):
    """`lora_id` names the adapter in generations and under /v1/loras; null where it was deleted."""

    lora_id: str | None
    base_model: str | None = None
    trigger_word: str | None = None
    steps: int | None = None
    final_loss: float | None = None
    warnings: list[str] = Field(default_factory=list)


class Training(Job):
    """`spec` is what is trained, every default filled in; `result` is there once it is COMPLETED."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "id": "train_0123456789ab",
                    "state": "RUNNING",
                    "name": "my-zib",
                    "spec": {"name": "my-zib", "model": "tiny"},
                    "progress": {"percent": 40.0, "stage": "training", "step": 80, "total_steps": 200, "loss": 0.11},
                    "created_at": "2026-01-02T03:04:05Z",
                    "updated_at": "2026-01-02T03:05:05Z",
                    "started_at": "2026-01-02T03:04:15Z",
                    "elapsed_s": 50.0,
                    "attempt": 1,
                    "attempts_max": 3,
                    "cancel_requested": False,
                }
            ]
        }
    )

    name: str | None = None
    spec: dict[str, Any]
    result: TrainingResult | None = None


class TrainingAccepted(View):
    """`ignored` are keys of an ai-toolkit configuration that have no use here."""

    training: Training
    ignored: list[str]
    warnings: list[str]


class StoredFile(View):
    """A file and a URL that is good for an hour."""

    filename: str
    url: str
    size_bytes: int | None = None
    content_type: str | None = None
    sha256: str | None = None


class Image(StoredFile):
    seed: int | None = None
    width: int | None = None
    height: int | None = None
    prompt: str | None = None


class Generation(Job):
    """`spec` is what is drawn. `images` is there once it is COMPLETED; null in lists."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "id": "gen_0123456789ab",
                    "state": "QUEUED",
                    "spec": {"prompts": ["a large red star on a blue background"], "model": "tiny", "seed": 1},
                    "progress": {"percent": 0.0},
                    "created_at": "2026-01-02T03:04:05Z",
                    "updated_at": "2026-01-02T03:04:05Z",
                    "attempt": 1,
                    "attempts_max": 3,
                    "cancel_requested": False,
                }
            ]
        }
    )

    spec: dict[str, Any]
    images: list[Image] | None = None


class Checkpoint(View):
    """A state that a training goes on from, and its adapter. `is_best`: it has the lowest validation loss so far."""

    step: int
    is_best: bool
    size_bytes: int
    created_at: datetime | None = None
    files: list[StoredFile]


class Sample(StoredFile):
    """A preview made at `step`; `index` is its prompt's place in the training's spec."""

    step: int
    index: int


class LossPoint(View):
    step: int
    loss: float | None


class LossHistory(View):
    """`complete` false: the training has not ended, and after its last checkpoint only the latest point is known."""

    complete: bool
    points: list[LossPoint]


class Files(View, Generic[T]):
    items: list[T]


class ApiKey(View):
    """A key that was made over HTTP, without the key itself. `last_used_at` is some minutes behind."""

    id: str
    tenant: str
    name: str
    created_at: datetime
    revoked_at: datetime | None = None
    last_used_at: datetime | None = None


class ApiKeyCreated(ApiKey):
    """`key` is shown here and nowhere else."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "id": "key_0123456789abcdef",
                    "tenant": "ada",
                    "name": "studio",
                    "created_at": "2026-01-02T03:04:05Z",
                    "revoked_at": None,
                    "last_used_at": None,
                    "key": "rl_...",
                }
            ]
        }
    )

    key: str


class DatasetFile(View):
    filename: str
    size_bytes: int
    sha256: str
    content_type: str | None = None


class Dataset(View):
    """The newest finished upload of a data set."""

    name: str
    upload_id: str
    trigger_word: str | None = None
    created_at: datetime
    size_bytes: int
    files: list[DatasetFile]


class DatasetName(View):
    name: str


class DatasetStored(View):
    dataset: Dataset
    warnings: list[str]


class UploadPlace(View):
    """PUT the file to `url` with exactly these headers."""

    filename: str
    method: Literal["PUT"] = "PUT"
    url: str
    headers: dict[str, str]


class UploadStarted(View):
    """The URLs end at `expires_at`."""

    id: str
    expires_at: datetime
    files: list[UploadPlace]


class LoraFileView(View):
    filename: str
    size_bytes: int | None = None
    sha256: str | None = None
    format: str | None = None
    step: int | None = None


class Lora(View):
    """An adapter that generations can name. `training_id` is null for one that was imported, `warnings` are what was
    taken for granted of an imported file."""

    id: str
    name: str
    source: Literal["training", "import"]
    training_id: str | None = None
    base_model: str | None = None
    trigger_word: str | None = None
    rank: int | None = None
    created_at: datetime
    files: list[LoraFileView]
    warnings: list[str] = Field(default_factory=list)


class LoraUpload(View):
    """PUT the file to `url` with exactly these headers before `expires_at`, then finish the import."""

    method: Literal["PUT"] = "PUT"
    url: str
    headers: dict[str, str]
    expires_at: datetime


class LoraImportStarted(View):
    id: str
    upload: LoraUpload


class Download(StoredFile):
    """A URL for one file; `expires_at` is when it ends."""

    expires_at: datetime


def job_fields(record: JobRecord, now: datetime) -> dict[str, Any]:
    return {
        "id": record.id,
        "state": record.state.value,
        "progress": progress_of(record),
        "error": failure_of(record),
        "created_at": record.created_at,
        "updated_at": record.updated_at,
        "started_at": record.started_at,
        "finished_at": record.finished_at,
        "elapsed_s": elapsed_s(record, now),
        "attempt": record.attempt,
        "attempts_max": record.attempts_max,
        "cancel_requested": record.cancel_requested,
    }


def progress_of(record: JobRecord) -> Progress:
    known = record.progress
    step, total = steps_of(record)
    return Progress(
        percent=progress_percent(record, step, total),
        step=step,
        total_steps=total,
        stage=_text(known.get("stage")),
        message=_text(known.get("message")),
        loss=_number(known.get("loss")),
        smoothed_loss=_number(known.get("smoothed_loss")),
        steps_per_s=_number(known.get("steps_per_s")),
        eta_s=None if record.state.is_terminal else _number(known.get("eta_s")),
        validation_loss=_number(known.get("validation_loss")),
        best_step=count_of(known.get("best_step")),
        gpu_memory_peak_bytes=count_of(known.get("gpu_memory_peak_bytes")),
        gpu_memory_total_bytes=count_of(known.get("gpu_memory_total_bytes")),
    )


def failure_of(record: JobRecord) -> Failure | None:
    message = error_text(record)
    if message is None:
        return None
    return Failure(code=record.error.code if record.error is not None else record.state.value.lower(), message=message)


def training_view(record: JobRecord, now: datetime) -> Training:
    result = None
    if record.state is JobState.COMPLETED:
        output = record.output or {}
        result = TrainingResult(
            lora_id=record.id if latest_lora(output) is not None else None,
            base_model=_text(output.get("base_model")),
            trigger_word=_text(output.get("trigger_word")),
            steps=_whole(output.get("steps")),
            final_loss=_number(output.get("final_loss")),
            warnings=[str(w) for source in (record.notes or {}, output) for w in source.get("warnings") or []],
        )
    name = _text(record.request.get("name"))
    return Training(**job_fields(record, now), name=name, spec=record.request, result=result)


def generation_view(record: JobRecord, now: datetime, images: list[Image] | None) -> Generation:
    spec = record.request.get("spec")
    shown = spec if isinstance(spec, dict) else {}
    return Generation(**job_fields(record, now), spec=shown | _start(record.request.get("start")), images=images)


def _start(start: Any) -> dict[str, Any]:
    """What a generation begins with, under the names that ask for it; pictures by their keys."""
    if not isinstance(start, dict):
        return {}
    pictures = {field: start[field]["key"] for field in ("init_image", "mask") if start.get(field) is not None}
    return {**pictures, "strength": start["strength"]}


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
