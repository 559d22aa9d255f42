"""Error bodies. None of them has a numeric `status` field: the asyncio RunPod client would poll on it for ever."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse

from serve_app.ingress.errors import PublicError, describe

RUNPOD_PATH_PREFIX = "/v2/"


def error_response(error: BaseException, *, path: str, request_id: str) -> JSONResponse:
    """The reply to a request that failed: RunPod's shape under /v2, problem+json (RFC 9457) elsewhere."""
    public = describe(error)
    headers: dict[str, str] = {}
    if public.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if public.retry_after_s is not None:
        headers["Retry-After"] = str(public.retry_after_s)
    if path.startswith(RUNPOD_PATH_PREFIX):
        return JSONResponse(runpod_error(public, request_id), status_code=public.status, headers=headers)
    return JSONResponse(
        _problem(public, request_id),
        status_code=public.status,
        headers=headers,
        media_type="application/problem+json",
    )


def runpod_error(public: PublicError, request_id: str) -> dict[str, Any]:
    return {"error": public.message, "error_type": public.code, "request_id": request_id, **public.details}


def _problem(public: PublicError, request_id: str) -> dict[str, Any]:
    return {
        "type": "about:blank",
        "title": public.message,
        "code": public.code,
        "request_id": request_id,
        **public.details,
    }
