"""Browsers: which pages may call, and what those that may not are told."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from serve_app.errors import CorsMethodNotAllowed, OriginNotAllowed
from serve_app.ingress.middleware import request_id_of
from serve_app.ingress.replies import error_response

METHODS = ("GET", "POST", "DELETE")
EXPOSED_HEADERS = ("X-Request-ID", "traceparent", "Retry-After", "Idempotent-Replayed", "X-Seed")


class Cors(CORSMiddleware):
    """Pages of `origins` may send any header and read replies. A refused preflight is an error as all others are.

    Headers need no list: what a page may do is decided by the key that it sends, and no cookie is looked at.
    """

    def __init__(self, app: ASGIApp, origins: Sequence[str]) -> None:
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=METHODS,
            allow_headers=("*",),
            # Chrome asks for this where a public page calls a server of a private network.
            allow_private_network=True,
            expose_headers=EXPOSED_HEADERS,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope)
        if refusal is None:
            await super().__call__(scope, receive, send)
            return
        reply = error_response(refusal, path=scope["path"], request_id=request_id_of(scope))
        # Caches must not take it for the answer to another page.
        reply.headers["Vary"] = self.preflight_headers["Vary"]
        await reply(scope, receive, send)

    def _refusal(self, scope: Scope) -> OriginNotAllowed | CorsMethodNotAllowed | None:
        if scope["type"] != "http" or scope["method"] != "OPTIONS":
            return None
        headers = Headers(scope=scope)
        origin, method = headers.get("origin"), headers.get("access-control-request-method")
        if origin is None or method is None:
            return None
        if not self.is_allowed_origin(origin):
            return OriginNotAllowed()
        return None if method in self.allow_methods else CorsMethodNotAllowed()
