"""RunPod's operations as the OpenAPI document shows them. Their routes take and return plain JSON objects."""

from __future__ import annotations

from typing import Any

from serve_app.ingress.envelope import POLICY_MAX_MS, POLICY_MIN_MS
from serve_app.ingress.openapi_inputs import input_examples, input_reference, input_schemas
from serve_app.outbound import URL_LENGTH_MAX

STATUSES = ["IN_QUEUE", "IN_PROGRESS", "COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT"]
_COUNT = {"type": "integer", "minimum": 0}
_WORKERS = ("idle", "initializing", "ready", "running", "throttled", "unhealthy")
_JOB = {"id": {"type": "string"}, "status": {"type": "string", "enum": STATUSES}}
_POLICY_MS = {"type": ["integer", "null"], "minimum": POLICY_MIN_MS, "maximum": POLICY_MAX_MS}
_PORT = "[1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5]"
_HTTPS_URL = f"^https://[A-Za-z0-9]([A-Za-z0-9.-]{{0,252}}[A-Za-z0-9])?(:({_PORT}))?([/?][\\x21-\\x7e]*)?$"
_EXAMPLE_ID = "2f0ff4a4-4f0c-4d0c-9d5c-2a1f4a3f5d11-u1"

RUNPOD_SCHEMAS: dict[str, Any] = {
    **input_schemas(),
    "RunpodRun": {
        "type": "object",
        "required": ["input"],
        "properties": {
            "input": input_reference(),
            "policy": {
                "type": ["object", "null"],
                "properties": {
                    "executionTimeout": {**_POLICY_MS, "description": "ms that the work may take."},
                    "ttl": {**_POLICY_MS, "description": "ms from now to the job's end, whatever it is."},
                    "lowPriority": {"type": "boolean", "description": "Run when nothing else waits."},
                },
            },
            "webhook": {
                "type": ["string", "null"],
                "description": "Where the final status is sent: a public address, unless the server takes any.",
                "maxLength": URL_LENGTH_MAX,
                "pattern": _HTTPS_URL,
                "examples": ["https://example.com/hook"],
            },
            "s3Config": {
                "type": ["object", "null"],
                "description": "Ignored, with a warning in the output: results are stored by this server.",
            },
        },
        "examples": [
            {"input": {"prompt": "a large red star", "width": 64, "height": 64, "seed": 1}},
            {"input": {"type": "health"}, "policy": {"executionTimeout": 600000}},
            *({"input": example} for example in input_examples()),
        ],
    },
    "RunpodAccepted": {
        "type": "object",
        "required": ["id", "status"],
        "properties": _JOB,
        "examples": [{"id": _EXAMPLE_ID, "status": "IN_QUEUE"}],
    },
    "RunpodStatus": {
        "type": "object",
        "required": ["id", "status"],
        "properties": {
            **_JOB,
            "delayTime": {**_COUNT, "description": "ms"},
            "executionTime": {**_COUNT, "description": "ms"},
            "retries": _COUNT,
            "workerId": {"type": ["string", "null"]},
            "output": {},
            "error": {"type": "string"},
        },
        "examples": [{"id": _EXAMPLE_ID, "status": "IN_PROGRESS", "delayTime": 120, "executionTime": 800}],
    },
    "RunpodStream": {
        "type": "object",
        "required": ["status", "stream"],
        "properties": {
            "status": _JOB["status"],
            "stream": {
                "type": "array",
                "items": {"type": "object", "required": ["output"], "properties": {"output": {}}},
            },
        },
        "examples": [{"status": "IN_PROGRESS", "stream": [{"output": {"step": 3, "loss": 0.21}}]}],
    },
    "RunpodPurged": {
        "type": "object",
        "required": ["removed", "status"],
        "properties": {"removed": _COUNT, "status": {"type": "string"}},
        "examples": [{"removed": 2, "status": "completed"}],
    },
    "RunpodHealth": {
        "type": "object",
        "required": ["jobs", "workers"],
        "properties": {
            "jobs": {
                "type": "object",
                "properties": dict.fromkeys(("completed", "failed", "inProgress", "inQueue", "retried"), _COUNT),
            },
            "workers": {
                "type": "object",
                "properties": dict.fromkeys(_WORKERS, _COUNT),
            },
        },
        "examples": [
            {
                "jobs": {"completed": 1, "failed": 0, "inProgress": 0, "inQueue": 0, "retried": 0},
                "workers": {
                    "idle": 1, "initializing": 0, "ready": 1, "running": 0, "throttled": 0, "unhealthy": 0
                },
            }
        ],
    },
}  # fmt: skip


def _answers(schema: str) -> dict[str, Any]:
    return {
        "responses": {
            "200": {
                "description": "The reply.",
                "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}},
            }
        }
    }


_BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/RunpodRun"}}},
    }
}
_WAIT = {
    "name": "wait",
    "in": "query",
    "required": False,
    "description": "Milliseconds to wait for the end; values out of range are taken to its ends.",
    "schema": {"type": "string", "pattern": "^[0-9]{1,12}$"},
}
_ENDPOINT = {"name": "endpoint_id", "in": "path", "required": True, "schema": {"type": "string"}}
_JOB_ID = {"name": "job_id", "in": "path", "required": True, "schema": {"type": "string"}}
_WAITS = {"parameters": [_ENDPOINT, _JOB_ID, _WAIT]}
_FOLLOWS = {
    (name, method): _answers(schema) | (_WAITS if waits else {})
    for name, schema, waits in (
        ("status/{job_id}", "RunpodStatus", False),
        ("status-sync/{job_id}", "RunpodStatus", True),
        ("stream/{job_id}", "RunpodStream", True),
    )
    for method in ("get", "post")
}
RUNPOD_OPERATIONS: dict[tuple[str, str], dict[str, Any]] = {
    ("run", "post"): _answers("RunpodAccepted") | _BODY,
    ("runsync", "post"): _answers("RunpodStatus") | _BODY | {"parameters": [_ENDPOINT, _WAIT]},
    **_FOLLOWS,
    ("cancel/{job_id}", "post"): _answers("RunpodAccepted"),
    ("retry/{job_id}", "post"): _answers("RunpodAccepted"),
    ("purge-queue", "post"): _answers("RunpodPurged"),
    ("health", "get"): _answers("RunpodHealth"),
}
"""By path below `/v2/{endpoint_id}/` and method."""
