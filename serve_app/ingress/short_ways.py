"""The calls that clients make most, past FastAPI's router, which takes as long for one as all that it is asked to do.

The routes stay in the application: they describe these calls, answer for their other methods, and serve where the
application is not at the root.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.datastructures import Headers, QueryParams
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from serve_app.errors import BodyInvalid
from serve_app.ingress.auth import Principal
from serve_app.ingress.envelope import read_idempotency_key
from serve_app.ingress.job_runner import Submission
from serve_app.ingress.middleware import request_id_of
from serve_app.ingress.replies import PlainJson
from serve_app.ingress.runpod_jobs import RunpodJobs
from serve_app.settings import RequestLimits

Way = Callable[[Scope, Receive], Awaitable[Response]]


class OftenCalled:
    """`/run`, `/runsync` and `/status` of RunPod's API, of a request that the layers have let through."""

    def __init__(self, jobs: RunpodJobs, limits: RequestLimits) -> None:
        self._jobs = jobs
        self._limits = limits

    async def run(self, scope: Scope, receive: Receive) -> Response:
        return PlainJson(await self._jobs.run(await _submission(scope, receive, None)))

    async def runsync(self, scope: Scope, receive: Receive) -> Response:
        held_s = wait_s(scope, self._limits, default_s=self._limits.runsync_wait_default_s)
        return PlainJson(await self._jobs.runsync(await _submission(scope, receive, held_s)))

    async def status(self, scope: Scope, job_id: str) -> Response:
        return PlainJson(await self._jobs.status(tenant_of(scope), request_id_of(scope), job_id))


class ShortWays:
    """Answers these calls; stands behind all other layers, in front of the routes."""

    def __init__(self, app: ASGIApp, calls: OftenCalled) -> None:
        self._app = app
        self._calls = calls

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answering = self._answering(scope, receive)
        if answering is None:
            await self._app(scope, receive, send)
        else:
            await (await answering)(scope, receive, send)

    def _answering(self, scope: Scope, receive: Receive) -> Awaitable[Response] | None:
        if scope["type"] != "http" or scope.get("root_path"):
            return None
        method = scope["method"]
        match scope["path"].split("/"):
            case ["", "v2", endpoint, "runsync"] if endpoint and method == "POST":
                return self._calls.runsync(scope, receive)
            case ["", "v2", endpoint, "run"] if endpoint and method == "POST":
                return self._calls.run(scope, receive)
            case ["", "v2", endpoint, "status", job_id] if endpoint and job_id and method in ("GET", "POST"):
                return self._calls.status(scope, job_id)
        return None


def tenant_of(scope: Scope) -> str:
    """Set by Authentication, which every route but /livez is behind."""
    principal: Principal = scope["state"]["principal"]
    return principal.tenant


def wait_s(scope: Scope, limits: RequestLimits, *, default_s: float) -> float:
    """`?wait=` in ms, in seconds and within RunPod's range. Raises BodyInvalid where it is not a number."""
    query = scope.get("query_string")
    text = QueryParams(query).get("wait") if query else None
    if text is None:
        return default_s
    if not (text.isascii() and text.isdigit() and len(text) <= 12):
        raise BodyInvalid("wait must be a number of milliseconds")
    return min(max(int(text) / 1000, limits.wait_min_s), limits.wait_max_s)


async def _submission(scope: Scope, receive: Receive, held_s: float | None) -> Submission:
    return Submission(
        tenant=tenant_of(scope),
        request_id=request_id_of(scope),
        body=await _body(receive),
        idempotency_key=read_idempotency_key(Headers(scope=scope).get("idempotency-key")),
        wait_s=held_s,
    )


async def _body(receive: Receive) -> bytes:
    """Raises ClientDisconnect where the client has gone before its end, and what the layer raises that limits it."""
    parts: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return parts[0] if len(parts) == 1 else b"".join(parts)
