"""What a job type gets to work with, and what it answers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from serve_app.collaborators import Clock, Dispatch, Inference, JobsApi, Validation, Workers
from serve_app.policy import Policy
from serve_app.settings import RateLimitSettings, RequestLimits, WebhookSettings
from serve_app.webhook_secrets import WebhookSecrets
from storage.job_record import JobRecord, NewWebhook
from storage.keys import Keys
from storage.objects import ObjectStore


@dataclass(frozen=True)
class JobDefaults:
    """What the records of this installation start with. Times in seconds."""

    training_timeout_s: float = 7200.0
    generation_timeout_s: float = 600.0
    attempts_max: int = 3
    generation_queue_max: int = 1000


@dataclass(frozen=True)
class Services:
    """Everything that a request may use. `worker_id` names this process in replies; `models` are the aliases served;
    `may_rest`: no inference replica is no fault; `reads_older`: the tenant for whom the older layout is readable."""

    jobs: JobsApi
    store: ObjectStore
    validation: Validation
    dispatch: Dispatch
    inference: Inference
    workers: Workers
    clock: Clock
    bucket: str
    prefix: str
    worker_id: str
    environment: dict[str, str]
    models: tuple[str, ...]
    webhook_secrets: WebhookSecrets
    defaults: JobDefaults = field(default_factory=JobDefaults)
    limits: RequestLimits = field(default_factory=RequestLimits)
    rate_limits: RateLimitSettings = field(default_factory=RateLimitSettings)
    ingress_replicas: int = 1
    may_rest: bool = False
    webhooks: WebhookSettings = field(default_factory=WebhookSettings)
    reads_older: str | None = None

    def keys_of(self, tenant: str) -> Keys:
        """Raises InvalidKey for a tenant whose name cannot be part of a key."""
        return Keys(self.prefix, tenant, reads_older=tenant == self.reads_older)


@dataclass(frozen=True)
class JobContext:
    """The request around a job type's input.

    `runpod_id` is empty outside the RunPod surface. `body_sha256` is the hex digest of the whole body as sent.
    `warnings` are of what stands around the input, and belong into the output.
    """

    tenant: str
    request_id: str
    runpod_id: str
    body_sha256: str
    idempotency_key: str | None = None
    policy: Policy = field(default_factory=Policy)
    webhook: NewWebhook | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Finished:
    """The job is done; `output` is its reply, with a `serve_app.links.Link` in the place of each URL."""

    output: dict[str, Any]


@dataclass(frozen=True)
class Following:
    """A record stands behind the job from here on."""

    record: JobRecord


Outcome = Finished | Following
Handler = Callable[[Services, JobContext, dict[str, Any]], Awaitable[Outcome]]

ACCEPTED_PREFIX = "accepted:"


def runpod_id_of(context: JobContext, *, waits: bool) -> str | None:
    """How a record notes the RunPod job that made it.

    With `waits` the RunPod job lasts as long as the record's work. Without, the RunPod job was only the acceptance: it
    is COMPLETED from the start, and the process goes on by itself. The record keeps which of the two it was, so that a
    restart changes no answer. None for requests that are no RunPod jobs.
    """
    if not context.runpod_id:
        return None
    return context.runpod_id if waits else f"{ACCEPTED_PREFIX}{context.runpod_id}"


def webhook_of(context: JobContext, *, waits: bool) -> NewWebhook | None:
    """What the record's end is to be told to. An acceptance ends at once, and is told as such by whoever accepted."""
    return context.webhook if waits else None


def is_accepted_only(record: JobRecord) -> bool:
    return (record.runpod_id or "").startswith(ACCEPTED_PREFIX)


def public_runpod_id(record: JobRecord) -> str | None:
    """The RunPod id that the client knows."""
    return None if record.runpod_id is None else record.runpod_id.removeprefix(ACCEPTED_PREFIX)
