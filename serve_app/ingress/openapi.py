"""The OpenAPI document: what FastAPI knows of the routes, with bodies, errors, the key and RunPod's replies added.

Error replies are the same for every route of a surface, so they are added here by surface and not at each route.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from serve_app.ingress.errors import TABLE
from serve_app.ingress.middleware import OPEN_PATHS
from serve_app.ingress.native.bodies import REGISTERED
from serve_app.ingress.openapi_runpod import RUNPOD_OPERATIONS, RUNPOD_SCHEMAS
from serve_app.ingress.replies import HUGGINGFACE_PATH_PREFIX, OPENAI_PATH_PREFIX, RUNPOD_PATH_PREFIX

VERSION = "1"
DESCRIPTION = (
    "Train LoRA adapters for diffusion models and draw pictures with them. Three surfaces over the same jobs: `/v1` "
    "for people who start here, `/v2/{endpoint_id}` for clients of RunPod's serverless API, and single routes that "
    "speak OpenAI's and Hugging Face's image calls."
)
TAGS = (
    "trainings",
    "generations",
    "datasets",
    "loras",
    "keys",
    "webhooks",
    "openai",
    "huggingface",
    "runpod",
    "server",
)
KEYS_PATH = "/v1/keys"
METHODS = frozenset({"get", "post", "delete", "put", "patch"})
ALWAYS = (400, 401, 404, 413, 429, 500, 502, 503, 504)
ON_WRITES = (409, 422)
WITH_RETRY_AFTER = frozenset({409, 429, 503})
TITLES = {
    400: "The request is wrong; every problem is named.",
    401: "No valid key.",
    403: "This key may not do that.",
    404: "What the request names does not exist for this key.",
    409: "It cannot be done in the present state, or the first request with this Idempotency-Key is at work.",
    413: "The body is too large.",
    422: "The Idempotency-Key came with another request.",
    429: "Too many calls.",
    500: "The server failed.",
    502: "A stored file or the storage is not as it should be.",
    503: "A part of the server is unavailable at present.",
    504: "A part of the server did not answer in time.",
}
_VALIDATION_ERRORS = {
    "type": "array",
    "items": {
        "type": "object",
        "required": ["path", "message", "code"],
        "properties": {name: {"type": "string"} for name in ("path", "message", "code")},
    },
}
ERROR_SCHEMAS: dict[str, Any] = {
    "Problem": {
        "type": "object",
        "description": "RFC 9457. `code` is stable.",
        "required": ["type", "title", "detail", "code", "request_id"],
        "properties": {
            "type": {"type": "string"},
            "title": {"type": "string", "description": "The phrase of the HTTP status."},
            "detail": {"type": "string", "description": "What went wrong here, and what to change."},
            "code": {"type": "string", "enum": sorted({str(getattr(cls, "code", "internal_error")) for cls in TABLE})},
            "request_id": {"type": "string"},
            "timeout": {"type": "boolean"},
            "validation_errors": _VALIDATION_ERRORS,
        },
        "examples": [
            {
                "type": "about:blank",
                "title": "Not Found",
                "detail": "job not found",
                "code": "job_not_found",
                "request_id": "5f0c6a1e",
            }
        ],
    },
    "RunpodError": {
        "type": "object",
        "description": "Has no numeric `status`: a client would poll on it.",
        "required": ["error", "error_type", "request_id"],
        "properties": {
            "error": {"type": "string"},
            "error_type": {"type": "string"},
            "request_id": {"type": "string"},
            "timeout": {"type": "boolean"},
            "validation_errors": _VALIDATION_ERRORS,
        },
        "examples": [{"error": "job not found", "error_type": "job_not_found", "request_id": "5f0c6a1e"}],
    },
    "OpenAIError": {
        "type": "object",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "required": ["message", "type", "param", "code"],
                "properties": {
                    "message": {"type": "string"},
                    "type": {"type": "string"},
                    "param": {"type": ["string", "null"]},
                    "code": {"type": "string"},
                },
            }
        },
        "examples": [
            {
                "error": {
                    "message": "Invalid request: prompt: is missing",
                    "type": "invalid_request_error",
                    "param": "prompt",
                    "code": "invalid_request",
                }
            }
        ],
    },
}
READINESS: dict[str, Any] = {
    "type": "object",
    "required": ["ready", "checks"],
    "properties": {
        "ready": {"type": "boolean"},
        "checks": {
            "type": "object",
            "additionalProperties": {
                "type": "object",
                "required": ["ok"],
                "properties": {"ok": {"type": "boolean"}, "error": {"type": ["string", "null"]}},
            },
        },
    },
    "examples": [
        {
            "ready": True,
            "checks": {
                "storage": {"ok": True, "breaker": "closed", "backend": "rclone", "latency_ms": 2.1},
                "jobs": {"ok": True, "active": 1, "mirror_pending": 0, "restored": True},
                "gpu": {"ok": True, "device": "cpu"},
                "replicas": {"ok": True, "ready": 1, "idle": 1},
                "disk": {"ok": True, "free_bytes": 64_000_000_000, "total_bytes": 128_000_000_000},
            },
        }
    ],
}
IDEMPOTENCY_KEY = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": False,
    "description": "The same key and request get the first reply again for 24 hours; another request gets 422.",
    "schema": {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[\\x21-\\x7e]{1,255}$"},
}
LAST_EVENT_ID = {
    "name": "Last-Event-ID",
    "in": "header",
    "required": False,
    "description": "The id of the last event that was seen.",
    "schema": {"type": "string", "pattern": "^[0-9]{1,18}$"},
}


def document(app: FastAPI) -> Callable[[], dict[str, Any]]:
    """What `app.openapi` becomes: the document, made once."""
    made: dict[str, Any] = {}

    def openapi() -> dict[str, Any]:
        if not made:
            made.update(_made(app))
        return made

    return openapi


def _made(app: FastAPI) -> dict[str, Any]:
    described = get_openapi(
        title=app.title,
        version=VERSION,
        description=DESCRIPTION,
        routes=app.routes,
        tags=[{"name": name} for name in TAGS],
    )
    schemas: dict[str, Any] = described.setdefault("components", {}).setdefault("schemas", {})
    _, bodies = models_json_schema(
        [(model, "validation") for model in REGISTERED], ref_template="#/components/schemas/{model}"
    )
    schemas |= bodies.get("$defs", {}) | ERROR_SCHEMAS | RUNPOD_SCHEMAS | {"Readiness": READINESS}
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    described["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, method, operation in _operations(described):
        _complete(path, method, operation)
    return described


def _operations(described: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, operations in described["paths"].items():
        for method, operation in operations.items():
            if method in METHODS:
                yield path, method, operation


def _complete(path: str, method: str, operation: dict[str, Any]) -> None:
    replies: dict[str, Any] = operation["responses"]
    # FastAPI's own shape of a wrong request, which no route answers with.
    replies.pop("422", None)
    if path in OPEN_PATHS:
        return
    operation["security"] = [{"key": []}]
    if path == "/readyz":
        for status in ("200", "503"):
            replies[status] = _reply("Ready, or which part is not.", "Readiness")
        replies["401"] = _error(path, 401)
        replies["429"] = _error(path, 429)
        return
    if path.startswith(RUNPOD_PATH_PREFIX):
        operation.update(RUNPOD_OPERATIONS.get((path.removeprefix("/v2/{endpoint_id}/"), method), {}))
        replies = operation["responses"]
    for status in (*ALWAYS, *(ON_WRITES if method != "get" else ())):
        replies.setdefault(str(status), _error(path, status))
    of_keys = path.startswith(KEYS_PATH)
    if of_keys:
        replies["403"] = _error(path, 403)
    once = path.startswith("/v1/") and method != "get" and not of_keys and not _is_foreign(path)
    extra = [IDEMPOTENCY_KEY] if once else []
    extra += [LAST_EVENT_ID] if path.endswith("/events") else []
    if extra:
        operation["parameters"] = [*operation.get("parameters", []), *extra]


def _is_foreign(path: str) -> bool:
    return path.startswith((OPENAI_PATH_PREFIX, HUGGINGFACE_PATH_PREFIX))


def _error(path: str, status: int) -> dict[str, Any]:
    schema, media = "Problem", "application/problem+json"
    if path.startswith(OPENAI_PATH_PREFIX):
        schema, media = "OpenAIError", "application/json"
    elif path.startswith((RUNPOD_PATH_PREFIX, HUGGINGFACE_PATH_PREFIX)):
        schema, media = "RunpodError", "application/json"
    reply = _reply(TITLES[status], schema, media)
    if status in WITH_RETRY_AFTER:
        reply["headers"] = {
            "Retry-After": {
                "description": "Seconds; there where asking again may help.",
                "schema": {"type": "integer", "minimum": 1},
            }
        }
    return reply


def _reply(title: str, schema: str, media: str = "application/json") -> dict[str, Any]:
    return {"description": title, "content": {media: {"schema": {"$ref": f"#/components/schemas/{schema}"}}}}
