"""Error bodies. None of them has a numeric `status` field: the asyncio RunPod client would poll on it for ever."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from pydantic_core import to_json
from starlette.responses import JSONResponse

from serve_app.errors import BodyInvalid, ServiceUnavailable
from serve_app.ingress.errors import PublicError, describe

RUNPOD_PATH_PREFIX = "/v2/"
OPENAI_PATH_PREFIX = "/v1/images/"
HUGGINGFACE_PATH_PREFIX = "/v1/hf/"
SURFACES = (RUNPOD_PATH_PREFIX, OPENAI_PATH_PREFIX, HUGGINGFACE_PATH_PREFIX, "")
"""The beginnings of paths that have a shape of errors of their own, and "" for all others."""
OPENAI_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class PlainJson(JSONResponse):
    """JSON values as bytes, several times as fast as Starlette's own; what is no number is null."""

    def render(self, content: Any) -> bytes:
        return to_json(content, inf_nan_mode="null")


def error_response(error: BaseException, *, path: str, request_id: str) -> JSONResponse:
    """The reply to a request that failed: RunPod's shape under /v2, OpenAI's and Hugging Face's on their routes,
    problem+json (RFC 9457) elsewhere."""
    public = describe(error)
    headers: dict[str, str] = {}
    if public.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if public.retry_after_s is not None:
        headers["Retry-After"] = str(public.retry_after_s)
    if path.startswith(OPENAI_PATH_PREFIX):
        return JSONResponse(openai_error(public), status_code=public.status, headers=headers)
    if path.startswith(HUGGINGFACE_PATH_PREFIX):
        return JSONResponse(runpod_error(public, request_id), status_code=public.status, headers=headers)
    if path.startswith(RUNPOD_PATH_PREFIX):
        return JSONResponse(runpod_error(public, request_id), status_code=public.status, headers=headers)
    return JSONResponse(
        _problem(public, request_id),
        status_code=public.status,
        headers=headers,
        media_type="application/problem+json",
    )


def lost_body(path: str) -> str:
    """What a proxy answers where the replica that had the request was lost; REQUEST_ID stands for the request's."""
    return bytes(error_response(ServiceUnavailable("ingress"), path=path, request_id="REQUEST_ID").body).decode()


def refused_body() -> str:
    """What a proxy answers to what it cannot read as a request."""
    return bytes(error_response(BodyInvalid("the request is malformed"), path="", request_id="").body).decode()


def runpod_error(public: PublicError, request_id: str) -> dict[str, Any]:
    """`retry_after_s` says what Retry-After does, for jobs, whose failure is no HTTP error."""
    later = {} if public.retry_after_s is None else {"retry_after_s": public.retry_after_s}
    return {"error": public.message, "error_type": public.code, "request_id": request_id, **later, **public.details}


def openai_error(public: PublicError) -> dict[str, Any]:
    """`param` names the field where exactly one is wrong."""
    wrong = {problem["path"] for problem in public.details.get("validation_errors", [])}
    kind = "invalid_request_error" if public.status < 500 else "server_error"
    return {
        "error": {
            "message": public.message,
            "type": OPENAI_TYPES.get(public.status, kind),
            "param": wrong.pop() if len(wrong) == 1 else None,
            "code": public.code,
        }
    }


def problem_head(public: PublicError) -> dict[str, Any]:
    """RFC 9457: of a problem without a type of its own, `title` is the status' phrase. `detail` is this occurrence."""
    return {"title": HTTPStatus(public.status).phrase, "detail": public.message, "code": public.code}


def _problem(public: PublicError, request_id: str) -> dict[str, Any]:
    return {
        "type": "about:blank",
        **problem_head(public),
        "request_id": request_id,
        **public.details,
    }
