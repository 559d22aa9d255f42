"""RunPod's operations as the OpenAPI document shows them. Their routes take and return plain JSON objects."""

from __future__ import annotations

from typing import Any

STATUSES = ["IN_QUEUE", "IN_PROGRESS", "COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT"]
_COUNT = {"type": "integer", "minimum": 0}
_WORKERS = ("idle", "initializing", "ready", "running", "throttled", "unhealthy")
_JOB = {"id": {"type": "string"}, "status": {"type": "string", "enum": STATUSES}}
_EXAMPLE_ID = "2f0ff4a4-4f0c-4d0c-9d5c-2a1f4a3f5d11-u1"

RUNPOD_SCHEMAS: dict[str, Any] = {
    "RunpodRun": {
        "type": "object",
        "required": ["input"],
        "properties": {
            "input": {
                "type": "object",
                "description": "`type` names the job type; a `prompt` without one is `generate`.",
                "properties": {"type": {"type": "string"}, "prompt": {"type": "string"}},
            },
            "policy": {
                "type": "object",
                "description": "`executionTimeout` and `ttl` in ms, `lowPriority`.",
            },
            "webhook": {"type": "string", "description": "Where the final status is sent."},
        },
        "examples": [
            {"input": {"prompt": "a large red star", "width": 64, "height": 64, "seed": 1}},
            {"input": {"type": "health"}, "policy": {"executionTimeout": 600000}},
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
