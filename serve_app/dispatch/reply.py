"""What is told and noted of RunPod jobs that have no job record."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from serve_app.links import PlacedLink
from serve_app.policy import Policy

Beginning = Literal["IN_QUEUE", "IN_PROGRESS"]
Status = Literal[Beginning, "COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT"]


@dataclass(frozen=True)
class Reply:
    """How a job without a record stands. `error` is set exactly where `status` is FAILED or TIMED_OUT. In `output` a
    `serve_app.links.Link` stands for each URL.

    A job of which a record may take over is IN_QUEUE until then, so that its status never goes backwards; any other is
    IN_PROGRESS. `is_interrupted`: its process was lost, which may have happened after it had made a record and before
    it could say so here. `attempt` counts from one, and goes on when the job is retried.
    """

    status: Status
    created_at: datetime
    finished_at: datetime | None = None
    output: dict[str, Any] | None = None
    error: str | None = None
    is_interrupted: bool = False
    attempt: int = 1

    @property
    def is_retryable(self) -> bool:
        return self.status in ("FAILED", "TIMED_OUT")

    @property
    def is_final(self) -> bool:
        return self.status not in ("IN_QUEUE", "IN_PROGRESS")


@dataclass(frozen=True)
class Sent:
    """What was sent with a job, for as long as it may be retried. `size_bytes` is that of the request's body, and
    `body_sha256` its hex digest. `begins_as` is the status with which each attempt begins."""

    input: dict[str, Any]
    policy: Policy
    webhook_url: str | None
    idempotency_key: str | None
    body_sha256: str
    size_bytes: int
    begins_as: Beginning
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class EndedReply:
    """A final reply that is to be found under its id for `kept_s`. With `sent`, a job that failed can be retried
    although the table has not been told of its beginning."""

    tenant: str
    runpod_id: str
    reply: Reply
    kept_s: float
    sent: Sent | None = None


@dataclass(frozen=True)
class Settled:
    """How a job ended, and in which attempt; or how it stands while a later attempt is under way."""

    status: Status
    attempt: int


@dataclass(frozen=True)
class Reopened:
    """A job that begins once more."""

    sent: Sent
    attempt: int


@dataclass(frozen=True)
class Fingerprint:
    """What makes two requests the same one: the client's key, or the body itself; kept for `kept_s`.

    Where the client named no key, the fingerprint of a request that failed is forgotten at once, so that the same
    body can be sent again after its cause was mended.
    """

    key: str
    body_sha256: str
    kept_s: float
    named_by_client: bool


@dataclass(frozen=True)
class Opening:
    """A job that begins. `owner` is the process that does it, which must be heard from until it has ended; None is
    believed for ever. `instead_of` is the id of an earlier same request that does not count any more."""

    kept_s: float
    fingerprint: Fingerprint | None = None
    owner: str | None = None
    status: Beginning = "IN_QUEUE"
    instead_of: str | None = None
    sent: Sent | None = None


@dataclass(frozen=True)
class Seen:
    """A request that was sent before, and the job that it began."""

    runpod_id: str
    body_sha256: str
    expires_at: datetime
    named_by_client: bool


@dataclass(frozen=True)
class SavedReply:
    """A job as it is noted outside the table, with the key under which its request is known, where there is one.

    `links` are those of its output, which is noted without them.
    """

    tenant: str
    runpod_id: str
    reply: Reply
    kept_s: float
    expires_at: datetime
    owner: str | None
    fingerprint: str | None
    seen: Seen | None
    sent: Sent | None = None
    links: tuple[PlacedLink, ...] = ()
