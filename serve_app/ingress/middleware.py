"""What happens to every request before a route sees it, as plain ASGI layers.

Outermost first: EdgeHeaders -> Cors (`serve_app.ingress.cors`, where origins are named) -> Guard -> Authentication ->
RateLimit (`serve_app.ingress.rate_limits`) -> BodyLimit -> ShortWays (`serve_app.ingress.short_ways`) -> routes.
`proxy_middlewares` puts EdgeHeaders in front of Serve's own proxy too, because the proxy obeys the two headers that
clients must not set before any replica sees the request, and ProxyErrors. Serve must have PROXY_ENVIRONMENT when it
starts.
"""

from __future__ import annotations

import logging
import re
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.errors import BodyTooLarge, ServiceUnavailable
from serve_app.ingress.auth import KeyRing
from serve_app.ingress.errors import INTERNAL, describe, where_raised
from serve_app.ingress.replies import RUNPOD_PATH_PREFIX, error_response
from serve_app.settings import RequestLimits

logger = logging.getLogger(__name__)

PROXY_ENVIRONMENT = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve_app.ingress.middleware:proxy_middlewares"}
REQUEST_ID_HEADER = "x-request-id"
TRACE_HEADER = "traceparent"
# With these a client could lift Serve's timeout or keep work running after it has gone.
REFUSED_HEADERS = (b"x-request-timeout-seconds", b"x-request-disconnect-disabled")
# What the RunPod surface takes as a job of these kinds, the native one takes too.
DATASETS_PATH, JOB_PATHS = "/v1/datasets", frozenset({"/v1/trainings", "/v1/generations"})
OPEN_PATHS = frozenset({"/livez", "/openapi.json", "/docs"})

_ID, _TRACE = REQUEST_ID_HEADER.encode(), TRACE_HEADER.encode()
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_TRACEPARENT = re.compile(r"00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
SLASHES = re.compile(r"/{2,}")


NOTE = "note"
"""Under this name, whoever stands in front of the layers may put a RequestNote into a request's state."""


@dataclass
class RequestNote:
    """What the layers find out about a request, for those in front of them."""

    request_id: str = ""
    tenant: str | None = None


class EdgeHeaders:
    """Gives the request an id, drops what clients may not set, and makes `//v2//x` the same path as `/v2/x`."""

    def __init__(self, app: ASGIApp, new_id: Callable[[], str] = lambda: uuid.uuid4().hex) -> None:
        self._app = app
        self._new_id = new_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        kept, offered_id, offered_trace = _taken(scope["headers"])
        request_id = _matching(_REQUEST_ID, offered_id) or self._new_id()
        trace = _matching(_TRACEPARENT, offered_trace)
        state = {**scope.get("state", {}), "request_id": request_id}
        if NOTE in state:
            state[NOTE].request_id = request_id
        scope = {**scope, "state": state}
        if "//" in scope["path"]:
            scope["path"] = SLASHES.sub("/", scope["path"])
        if b"//" in (scope.get("raw_path") or b""):
            scope["raw_path"] = re.sub(rb"/{2,}", b"/", scope["raw_path"])
        scope["headers"] = [*kept, (_ID, request_id.encode())]

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers[REQUEST_ID_HEADER] = request_id
                if trace is not None:
                    headers[TRACE_HEADER] = trace
            await send(message)

        await self._app(scope, receive, send_with_id)


class Guard:
    """Turns whatever escapes the layers below into a JSON reply; logs where it came from, never its text.

    An exception's text may hold a presigned URL or a path. Cancellation passes through.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def tracked_send(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, receive, tracked_send)
        except ClientDisconnect:
            # There is nobody left to answer. The access log tells of it by its status.
            logger.info("The client of request %s went away before the end of its body", request_id_of(scope))
        except Exception as error:
            if describe(error).code == INTERNAL.code:
                log_unexpected(error, request_id_of(scope))
            if started:
                raise
            await error_response(error, path=scope["path"], request_id=request_id_of(scope))(scope, receive, send)


class ProxyErrors:
    """Gives the reply that Serve's proxy owes where a replica was lost: it sends none, or an exception's text.

    Every error of the application is JSON, and every one of the proxy is plain text.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        is_owed = True

        async def checked_send(message: Message) -> None:
            nonlocal is_owed
            if message["type"] == "http.response.start":
                kind = Headers(raw=message["headers"]).get("content-type", "")
                is_owed = message["status"] >= 400 and kind.startswith("text/plain")
            if not is_owed:
                await send(message)

        await self._app(scope, receive, checked_send)
        if is_owed:
            error = ServiceUnavailable("ingress")
            await error_response(error, path=scope["path"], request_id=request_id_of(scope))(scope, receive, send)


class Authentication:
    """Lets a request through only with a valid key, before its body is read. Sets `scope["state"]["principal"]`."""

    def __init__(self, app: ASGIApp, keys: KeyRing) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            principal = await self._keys.principal(Headers(scope=scope).get("authorization"))
            scope["state"] = {**scope.get("state", {}), "principal": principal}
            if NOTE in scope["state"]:
                scope["state"][NOTE].tenant = principal.tenant
        await self._app(scope, receive, send)


class BodyLimit:
    """Refuses a body over its route's size, by its declared length or while it arrives."""

    def __init__(self, app: ASGIApp, limits: RequestLimits) -> None:
        self._app = app
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit_bytes = self._limit_bytes(scope["path"])
        way_out = "create_upload" if scope["path"].startswith(RUNPOD_PATH_PREFIX) else "POST /v1/uploads"
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdecimal() and int(declared) > limit_bytes:
            raise BodyTooLarge(limit_bytes, way_out)
        seen_bytes = 0

        async def counted_receive() -> Message:
            nonlocal seen_bytes
            message = await receive()
            if message["type"] == "http.request":
                seen_bytes += len(message.get("body", b""))
                if seen_bytes > limit_bytes:
                    raise BodyTooLarge(limit_bytes, way_out)
            return message

        await self._app(scope, counted_receive, send)

    def _limit_bytes(self, path: str) -> int:
        if path.endswith("/runsync"):
            return self._limits.runsync_body_bytes_max
        if path.endswith("/run"):
            return self._limits.run_body_bytes_max
        if path == DATASETS_PATH:
            return self._limits.runsync_body_bytes_max
        if path in JOB_PATHS:
            return self._limits.run_body_bytes_max
        return self._limits.other_body_bytes_max


def proxy_middlewares() -> list[Middleware]:
    """What Serve's proxy puts in front of itself, innermost first, as Serve takes them; see the module's text."""
    return [Middleware(ProxyErrors), Middleware(EdgeHeaders)]


def request_id_of(scope: Scope) -> str:
    return str(scope.get("state", {}).get("request_id", ""))


def log_unexpected(error: BaseException, request_id: str) -> None:
    """Log type and place of an error that no table row expects, without its text."""
    logger.error("Unexpected %s in request %s at %s", type(error).__name__, request_id, where_raised(error))


def _taken(headers: Iterable[tuple[bytes, bytes]]) -> tuple[list[tuple[bytes, bytes]], str | None, str | None]:
    """The headers that are handed on, the request id and the trace; the first of each where there are several."""
    kept: list[tuple[bytes, bytes]] = []
    request_id = trace = None
    for name, value in headers:
        lower = name.lower()
        if lower in REFUSED_HEADERS:
            continue
        if lower == _ID:
            request_id = value.decode("latin-1") if request_id is None else request_id
            continue
        if lower == _TRACE and trace is None:
            trace = value.decode("latin-1")
        kept.append((name, value))
    return kept, request_id, trace


def _matching(pattern: re.Pattern[str], value: str | None) -> str | None:
    return value if value is not None and pattern.fullmatch(value) else None
