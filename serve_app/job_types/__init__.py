"""The job types of `input`, by name."""

from __future__ import annotations

from typing import Any

from serve_app.errors import InvalidRequest, UnknownJobType
from serve_app.job_types.bulk import bulk_download, delete_results
from serve_app.job_types.context import Handler
from serve_app.job_types.generate import generate
from serve_app.job_types.health import health
from serve_app.job_types.loras import download, list_models
from serve_app.job_types.processes import cancel, process_status, processes
from serve_app.job_types.stored_files import download_by_key, download_file, list_dataset_folders, list_files
from serve_app.job_types.train import train
from serve_app.job_types.upload import create_upload, finalize_upload, upload_training_data
from train_jobs.errors import Problem

HANDLERS: dict[str, Handler] = {
    "health": health,
    "train": train,
    "train_with_yaml": train,
    "generate": generate,
    "upload_training_data": upload_training_data,
    "upload_training_files": upload_training_data,
    "create_upload": create_upload,
    "finalize_upload": finalize_upload,
    "processes": processes,
    "process_status": process_status,
    "cancel": cancel,
    "lora": list_models,
    "list_models": list_models,
    "download": download,
    "download_by_key": download_by_key,
    "download_file": download_file,
    "bulk_download": bulk_download,
    "list_files": list_files,
    "list_dataset_folders": list_dataset_folders,
    "delete_results": delete_results,
}

STARTS_WORK = frozenset({"train", "train_with_yaml", "generate", "upload_training_data", "upload_training_files"})
"""Types for which the same body, sent twice within a short time, is taken for one request."""

CHANGES_THINGS = STARTS_WORK | {"finalize_upload", "cancel", "delete_results"}
"""Types whose reply is kept as long as the Idempotency-Key that came with it. Those of the others may hold URLs, which
are good for less, and to do them once more does no harm."""


def job_type_of(payload: dict[str, Any]) -> str:
    """The name of the job type. Raises UnknownJobType, InvalidRequest where nothing tells the type."""
    name = payload.get("type")
    if name is None and "prompt" in payload:
        return "generate"
    if name is None:
        raise InvalidRequest([Problem("input.type", "is missing", "missing")])
    if not isinstance(name, str) or name not in HANDLERS:
        raise UnknownJobType(str(name)[:100])
    return name
