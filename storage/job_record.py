"""The data of a job: what is stored, what is asked for at creation, and the small replies of the life cycle."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, model_validator

from storage.job_state import JobKind, JobState

JobSource = Literal["http", "ray", "cli"]

JOB_ID_PATTERN = r"^(train|gen)_[0-9a-f]{12}$"

ATTEMPTS_MAX = 3
DEFAULT_LEASE_S = 30.0
LAUNCHER_OWNER = "training-queue"
"""Holds the lease of a training from its claim until the driver of its Ray job adopts it."""

SETTLED_BY_USER = "user"
SETTLED_BY_SWEEP = "sweep"
SETTLED_BY_SUPERVISOR = "supervisor"


def _as_utc(value: datetime) -> datetime:
    return value.astimezone(UTC)


UtcTime = Annotated[AwareDatetime, AfterValidator(_as_utc)]


class JobFailure(BaseModel):
    """Why a job ended without its result. `message` is written for the client: no paths, keys or exception texts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    code: str
    message: str


class JobRecord(BaseModel):
    """One job, as stored. Its JSON form round-trips exactly and is what the mirror in object storage holds.

    Times are aware and in UTC. `updated_at` grows strictly with each visible change, so it serves as a version for
    `wait`. `queued_at` is when the user asked for the work: its creation, or its last retry. `started_at` belongs to
    the current attempt; `timeout_s` counts from it and `ttl_s` from `queued_at`. `notes` are what the acceptance told
    beside the id, such as warnings; None in records that nobody noted anything with.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str = Field(pattern=JOB_ID_PATTERN)
    tenant: str
    kind: JobKind
    state: JobState
    request: dict[str, Any]
    notes: dict[str, Any] | None = None
    source: JobSource
    runpod_id: str | None = None
    created_at: UtcTime
    queued_at: UtcTime
    updated_at: UtcTime
    started_at: UtcTime | None = None
    finished_at: UtcTime | None = None
    attempt: int = Field(default=1, ge=1)
    attempts_max: int = Field(default=ATTEMPTS_MAX, ge=1)
    lease_owner: str | None = None
    lease_expires_at: UtcTime | None = None
    cancel_requested: bool = False
    cancel_requested_at: UtcTime | None = None
    progress: dict[str, Any] = Field(default_factory=dict)
    output: dict[str, Any] | None = None
    error: JobFailure | None = None
    settled_by: str | None = None
    submission_id: str | None = None
    worker_id: str | None = None
    timeout_s: float = Field(gt=0)
    ttl_s: float | None = Field(default=None, gt=0)
    priority: int = 0


class JobEvent(BaseModel):
    """One report of a job's progress. `seq` grows from event to event, over all jobs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seq: int
    at: UtcTime
    data: dict[str, Any]


class Drained(BaseModel):
    """Events given out by a drain, and the job as it then was.

    `is_end`: the job has ended and no event is left. `was_ended`: an earlier drain said so already.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    record: JobRecord
    events: tuple[JobEvent, ...]
    is_end: bool
    was_ended: bool


class NewWebhook(BaseModel):
    """Where to POST the end of a job, together with the `input` that the client sent."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: str = Field(repr=False)
    input: dict[str, Any] = Field(repr=False)


class NewJob(BaseModel):
    """What it takes to create a job.

    `job_id` makes a repeated creation harmless: the record that has this id is returned. JobsClient fills it in.
    With `owner`, the record is created STARTING under that owner's lease, so that nobody else claims it; a job that
    comes with a `submission_id` already runs, and therefore needs its owner.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: JobKind
    tenant: str = Field(min_length=1)
    request: dict[str, Any]
    notes: dict[str, Any] | None = None
    source: JobSource = "http"
    job_id: str | None = Field(default=None, pattern=JOB_ID_PATTERN)
    runpod_id: str | None = None
    idempotency_key: str | None = Field(default=None, min_length=1, max_length=255)
    body_sha256: str | None = None
    timeout_s: float = Field(default=7 * 24 * 3600.0, gt=0)
    ttl_s: float | None = Field(default=None, gt=0)
    attempts_max: int = Field(default=ATTEMPTS_MAX, ge=1)
    submission_id: str | None = None
    owner: str | None = None
    lease_s: float = Field(default=DEFAULT_LEASE_S, gt=0)
    priority: int = 0
    webhook: NewWebhook | None = None

    @model_validator(mode="after")
    def _parts_belong_together(self) -> NewJob:
        if self.submission_id is not None and self.owner is None:
            raise ValueError("a job created with a submission_id needs the owner that runs it")
        if self.idempotency_key is not None and self.body_sha256 is None:
            raise ValueError("an idempotency_key needs the body_sha256 it stands for")
        if self.job_id is not None and not self.job_id.startswith(self.kind.id_prefix):
            raise ValueError("the job_id does not belong to this kind")
        return self


class Heartbeat(BaseModel):
    """The answer to a heartbeat. Either flag asks the owner to save what it has and settle the job itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cancel_requested: bool
    timed_out: bool


class JobsHealth(BaseModel):
    """`mirror_pending` records are yet to be written to object storage; `restored` tells whether an empty database
    has finished looking there for its records."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mirror_pending: int
    restored: bool


class Page(BaseModel):
    """Records newest first. `next_cursor` is None on the last page."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    records: tuple[JobRecord, ...]
    next_cursor: str | None


class Submission(BaseModel):
    """A Ray job that was submitted for one attempt of a training and is not known to have ended."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    submission_id: str
    job_id: str


def submission_id_for(job_id: str, attempt: int) -> str:
    """The Ray submission id of an attempt: the job id itself at first, then `<job id>-r<attempt>`."""
    return job_id if attempt == 1 else f"{job_id}-r{attempt}"
