"""The one table: exception class -> HTTP status, code, public message.

A class that is not listed takes the row of its nearest listed base class; one without any is an `internal_error`.
No row shows an exception's own text: messages are built here, from fields that hold our own words.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusion.errors as d
import serve_app.errors as s
import storage.datasets as ds
import storage.errors as o
import storage.imported_loras as il
import train_jobs.errors as t

Message = str | Callable[[Any], str]
MIB = 1024 * 1024
VALIDATION_SHOWN_MAX = 5


@dataclass(frozen=True)
class Row:
    """`retryable`: whether a job that failed with it is worth another attempt. No `code` means the class's own."""

    status: int
    message: Message
    code: str | None = None
    retryable: bool = False


@dataclass(frozen=True)
class PublicError:
    """What a client may know of an error. `details` are further fields of the reply, JSON."""

    status: int
    code: str
    message: str
    retryable: bool = False
    retry_after_s: int | None = None
    details: dict[str, Any] = field(default_factory=dict)


INTERNAL = Row(500, "The request failed for an internal reason.", code="internal_error")


def _own_words(error: Any) -> str:
    """Classes whose `public_message` is written for clients."""
    return str(error.public_message)


def _diffusion_words(error: d.DiffusionError) -> str:
    """That package writes the texts of its errors for whoever sent the request."""
    text = str(error)
    return text[:1].upper() + text[1:]


def _validation(error: Any) -> str:
    problems = [f"{p.path}: {p.message}" if p.path else p.message for p in error.problems]
    more = len(problems) - VALIDATION_SHOWN_MAX
    shown = "; ".join(problems[:VALIDATION_SHOWN_MAX]) + (f"; and {more} more" if more > 0 else "")
    return f"Invalid request: {shown or 'it does not have the expected form'}"


def _too_large(error: s.BodyTooLarge) -> str:
    return (
        f"The request is over {error.limit_bytes / MIB:g} MB. Send large files by presigned upload "
        f"({error.way_out}) and refer to them."
    )


TABLE: dict[type[BaseException], Row] = {
    # The HTTP side.
    s.ServeError: INTERNAL,
    s.Unauthorized: Row(401, "A valid API key is required: 'Authorization: Bearer KEY'."),
    s.KeysNotAllowed: Row(403, "Keys are made and revoked with the instance's own key only."),
    s.RouteNotFound: Row(404, "There is nothing at this path."),
    s.MethodNotAllowed: Row(405, "This path does not take this method."),
    s.OriginNotAllowed: Row(
        403, "Pages of this origin may not call this server: it is not in its setting cors_origins."
    ),
    s.CorsMethodNotAllowed: Row(400, "Pages may call this server with GET, POST and DELETE only."),
    s.BodyTooLarge: Row(413, _too_large),
    s.BodyInvalid: Row(400, lambda e: f"Invalid request: {e.reason}"),
    s.InvalidRequest: Row(400, _validation),
    s.UnknownJobType: Row(400, lambda e: f"Unknown job type: {e.name}"),
    s.RunpodJobNotFound: Row(404, "job not found"),
    s.TrainingNotEnded: Row(409, "This training has not ended yet. Wait for its end, or cancel it."),
    s.RunpodJobNotKept: Row(409, "What was sent for this job is not kept. Send the request again instead."),
    s.RunpodJobNotRetryable: Row(409, "Only a job that failed or timed out can be retried."),
    s.IdempotencyKeyReused: Row(422, "This Idempotency-Key was used with another request."),
    s.ProcessNotFound: Row(404, "Process not found"),
    s.ProcessNotCancellable: Row(409, "Process not found or cannot be cancelled"),
    s.ProcessNotCompleted: Row(409, "Process not completed"),
    s.ProcessFilesDeleted: Row(410, "The process has completed, but its files were deleted."),
    s.UploadNotFound: Row(404, "There is no such upload, or it was created too long ago."),
    s.LoraNotUsable: Row(400, lambda e: f"LoRA '{e.name}' cannot be used: {e.reason}"),
    s.LoraFileInvalid: Row(400, lambda e: f"The file cannot be taken as a LoRA: {e.reason}"),
    s.GenerationRefused: Row(400, lambda e: e.message),
    s.GenerationFailed: Row(500, lambda e: e.message),
    s.DatasetInUse: Row(409, lambda e: f"Dataset '{e.folder}' is read by a training that has not ended."),
    s.ModelNotServed: Row(
        400, lambda e: f"Model '{e.model}' is not served here. Models of this server: {', '.join(e.known)}"
    ),
    s.RequestTimedOut: Row(504, lambda e: f"Request timeout after {e.timeout_s:g} seconds"),
    s.TooManyRequests: Row(429, "This key sends requests faster than it may. Try again later."),
    s.TooManyAtOnce: Row(429, "This key has as many requests under way as it may. Try again later."),
    s.TooManyUploads: Row(
        429,
        "As many uploads, bundles and pictures of yours as may be are on their way. Send this one again later.",
        retryable=True,
    ),
    s.QueueFull: Row(
        429, lambda e: f"No more generations can wait now ({e.waiting} of yours do). Try again later.", retryable=True
    ),
    s.AddressRefused: Row(400, "This server does not send to that address."),
    s.OutboundFailed: Row(502, "What was sent to that address did not arrive.", retryable=True),
    s.JobInterrupted: Row(503, "The server lost this job before it had ended. Send it again.", retryable=True),
    s.ServiceUnavailable: Row(503, lambda e: f"The {e.part} service did not answer. Try again.", retryable=True),
    # Objects.
    o.StorageError: Row(503, "The object storage failed.", retryable=True),
    o.ObjectNotFound: Row(404, "The file does not exist."),
    o.StorageAccessDenied: Row(502, "The object storage refused the server's credentials."),
    o.InvalidKey: Row(400, lambda e: f"Invalid file name or key: {e.reason}"),
    o.IntegrityError: Row(502, "A stored file does not have the expected content.", retryable=True),
    o.StorageUnavailable: Row(503, "The object storage is unavailable at present. Try again later.", retryable=True),
    o.StorageTimeout: Row(503, "The object storage did not answer in time. Try again later.", retryable=True),
    o.StorageFailed: Row(503, "The object storage failed. Try again later.", retryable=True),
    o.StorageRefused: Row(502, "The object storage refused the request.", retryable=True),
    o.StorageMisconfigured: Row(500, "The object storage is not configured correctly."),
    ds.DatasetNotFound: Row(404, lambda e: f"Dataset '{e.folder}' was not found. Upload it first."),
    ds.DatasetNotStored: Row(
        503,
        lambda e: f"{len(e.failures)} files of dataset '{e.folder}' could not be stored. Send the upload again.",
        retryable=True,
    ),
    ds.DatasetManifestInvalid: Row(502, lambda e: f"Dataset '{e.folder}' cannot be read. Upload it again."),
    il.ImportedLoraNotFound: Row(404, "There is no such LoRA."),
    o.PortInUse: Row(500, "The object storage is not configured correctly."),
    # Job records.
    o.JobError: Row(500, "The job could not be handled."),
    o.ApiKeyNotFound: Row(404, "There is no such key."),
    o.JobNotFound: Row(404, "job not found"),
    o.IdempotencyConflict: Row(422, "This Idempotency-Key was used with another request."),
    o.IllegalTransition: Row(409, "The job cannot do this in its present state."),
    o.JobNotCancellable: Row(409, "The job has already ended."),
    o.JobNotRetryable: Row(409, "Only a job that failed or timed out can be retried."),
    o.LeaseLost: Row(409, "Another worker has taken this job over."),
    o.IdempotencyInFlight: Row(409, "The first request with this Idempotency-Key is still in progress."),
    o.InvalidCursor: Row(400, "Invalid request: cursor: it is not one that this server gave"),
    o.JobsUnavailable: Row(503, "The jobs service did not answer. Try again.", retryable=True),
    o.RecordsError: Row(503, "The job records are unavailable at present. Try again later.", retryable=True),
    o.RecordsUnavailable: Row(503, "The job records are unavailable at present. Try again later.", retryable=True),
    o.RecordConflict: Row(409, "The job conflicts with one that exists."),
    o.RecordsFailed: Row(500, "The job records could not be read or written."),
    o.RecordsMisconfigured: Row(500, "The job records are not configured correctly."),
    # Training.
    t.TrainingError: Row(500, _own_words),
    t.ConfigInvalid: Row(400, _validation),
    t.DatasetNotFound: Row(404, _own_words),
    t.DatasetEmpty: Row(400, _own_words),
    t.ImageUnreadable: Row(400, _own_words),
    t.ModelNotAvailable: Row(400, _own_words),
    t.NonFiniteLoss: Row(500, _own_words),
    t.OutOfMemory: Row(507, _own_words),
    t.CheckpointInvalid: Row(500, _own_words),
    t.TrainingCancelled: Row(409, _own_words),
    t.TrainingTimedOut: Row(504, _own_words),
    t.TrainingInterrupted: Row(503, _own_words, retryable=True),
    t.StorageFailed: Row(502, _own_words, retryable=True),
    # Making pictures.
    # Pictures.
    d.DiffusionError: Row(500, "The picture could not be made."),
    d.ModelNotFound: Row(500, _diffusion_words),
    d.UnsupportedModel: Row(500, _diffusion_words),
    d.LoraInvalid: Row(400, _diffusion_words),
    d.LoraMismatch: Row(400, _diffusion_words),
    d.SizeNotSupported: Row(400, _diffusion_words),
    d.SettingNotSupported: Row(400, _diffusion_words),
    d.Cancelled: Row(409, _diffusion_words),
    d.OutOfGpuMemory: Row(507, _diffusion_words),
    d.InsufficientMemory: Row(507, _diffusion_words, retryable=True),
}


def describe(error: BaseException) -> PublicError:
    """What a client may know of `error`; of the error behind it where Ray wrapped it."""
    error = unwrapped(error)
    for cls in type(error).__mro__:
        row = TABLE.get(cls)
        if row is not None:
            return _public(error, row)
    return _public(error, INTERNAL)


def status_of_code(code: str) -> int:
    """The status of the error whose stable code this is, as records keep them; 500 for an unknown one."""
    return _STATUS_BY_CODE.get(code, INTERNAL.status)


def unwrapped(error: BaseException) -> BaseException:
    """The application's error inside Ray's `RayTaskError`, which carries it as `cause`."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, Exception) else error


def where_raised(error: BaseException) -> str:
    """Module, line and function of every frame, for a log. Not the error's text: that may hold a URL or a key."""
    frames = traceback.walk_tb(error.__traceback__)
    return " > ".join(f"{f.f_globals.get('__name__')}:{line} {f.f_code.co_name}" for f, line in frames)


def _public(error: BaseException, row: Row) -> PublicError:
    message = row.message if isinstance(row.message, str) else row.message(error)
    code = row.code or str(getattr(error, "code", "internal_error"))
    retry_after_s = getattr(error, "retry_after_s", None)
    details: dict[str, Any] = {}
    if isinstance(error, s.InvalidRequest | t.ConfigInvalid):
        details["validation_errors"] = [problem.as_json() for problem in error.problems]
    if isinstance(error, ds.DatasetNotStored):
        details["failed_files"] = [{"filename": name, "code": code} for name, code in error.failures]
    if isinstance(error, s.RequestTimedOut):
        details["timeout"] = True
    return PublicError(
        status=row.status,
        code=code,
        message=message,
        retryable=row.retryable,
        retry_after_s=None if retry_after_s is None else max(1, math.ceil(retry_after_s)),
        details=details,
    )


_STATUS_BY_CODE = {row.code or str(getattr(cls, "code", "")): row.status for cls, row in TABLE.items()}
