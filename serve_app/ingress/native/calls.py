"""What the routes of `/v1` share: who asks, which record is meant, how a job type is called."""

from __future__ import annotations

import hashlib
import re

from fastapi import Request
from fastapi.exceptions import RequestValidationError

from serve_app.errors import RouteNotFound
from serve_app.ingress.auth import Principal
from serve_app.ingress.envelope import read_idempotency_key
from serve_app.ingress.middleware import request_id_of
from serve_app.job_types.context import JobContext, Services
from serve_app.policy import Policy
from storage.errors import JobNotFound
from storage.job_record import JOB_ID_PATTERN, JobRecord
from storage.job_state import JobKind

_JOB_ID = re.compile(JOB_ID_PATTERN)


def tenant_of(request: Request) -> str:
    """Set by Authentication, which every route here is behind."""
    principal: Principal = request.scope["state"]["principal"]
    return principal.tenant


def request_digest(request: Request, body: bytes) -> str:
    """What makes two requests with one Idempotency-Key the same: method, path, query and body; hex."""
    head = f"{request.method} {request.scope['path']}?{request.scope['query_string'].decode('latin-1')}\n"
    return hashlib.sha256(head.encode() + body).hexdigest()


def key_name(key: str) -> str:
    """The key as it is stored: of `/v1` only, so that it never meets one of the RunPod surface."""
    return f"v1:{hashlib.sha256(key.encode()).hexdigest()}"


async def context_of(request: Request, policy: Policy | None = None) -> JobContext:
    """The context of a job type that this request asks for."""
    key = read_idempotency_key(request.headers.get("idempotency-key"))
    return JobContext(
        tenant=tenant_of(request),
        request_id=request_id_of(request.scope),
        runpod_id="",
        body_sha256=request_digest(request, await request.body()),
        # Kept with the record too: should this process end before it answers, the next try finds the same job.
        idempotency_key=None if key is None else key_name(key),
        policy=policy or Policy(),
    )


async def only_known_parameters(request: Request) -> None:
    """Raises RequestValidationError for a query's parameter that the route does not have: a misspelt filter or limit
    would change what is answered, and nobody would be told."""
    known = {field.alias for field in request.scope["route"].dependant.query_params}
    unknown = dict.fromkeys(name for name in request.query_params if name not in known)
    if unknown:
        raise RequestValidationError([{"type": "extra_forbidden", "loc": ("query", name)} for name in unknown])


async def record_of(services: Services, request: Request, job_id: str, kind: JobKind) -> JobRecord:
    """Raises JobNotFound: unknown, another tenant's, or of another kind."""
    check_id(job_id, kind)
    return await services.jobs.get(job_id, tenant=tenant_of(request))


def check_id(job_id: str, kind: JobKind) -> None:
    """Raises JobNotFound for what cannot be an id of this kind, before any database sees it."""
    if not _JOB_ID.match(job_id) or not job_id.startswith(kind.id_prefix):
        raise JobNotFound(job_id[:100])


def checked_name(name: str, pattern: str) -> str:
    """A path's segment that names something. Raises RouteNotFound for what can name nothing."""
    if not re.match(pattern, name):
        raise RouteNotFound
    return name
