"""Every way in which the HTTP side itself refuses or fails, as one tree.

    ServeError
    +-- Unauthorized            no valid key
    +-- KeysNotAllowed          the key may not make or revoke keys
    +-- RouteNotFound           no such path
    +-- MethodNotAllowed        the path exists, the method does not
    +-- OriginNotAllowed        a browser asks for a page of an origin that is not listed
    +-- CorsMethodNotAllowed    a browser asks for a method that no route takes
    +-- BodyTooLarge            more bytes than the route takes
    +-- BodyInvalid             not the JSON object that the route takes
    +-- InvalidRequest          well-formed, but wrong; holds every problem found
    +-- UnknownJobType          `input.type` names nothing that exists here
    +-- RunpodJobNotFound       unknown, expired or another tenant's RunPod id
    +-- RunpodJobNotRetryable   the job ended in a state that /retry does not take
    +-- IdempotencyKeyReused    the same key came with another body
    +-- ProcessNotFound         unknown or another tenant's process
    +-- ProcessNotCancellable   unknown, another tenant's or already ended
    +-- ProcessNotCompleted     its files do not exist yet
    +-- ProcessFilesDeleted     it has completed, and its files were deleted
    +-- TrainingNotEnded        what has not ended cannot be continued by another
    +-- LoraNotUsable           the request names an adapter that cannot be applied
    +-- LoraFileInvalid         an imported adapter's file is not one
    +-- GenerationRefused       a generation failed for what was asked
    +-- GenerationFailed        a generation failed on our side
    +-- DatasetInUse            a training that has not ended reads it
    +-- ModelNotServed          the request names a base model that is not configured
    +-- UploadNotFound          no such upload to finalize
    +-- RequestTimedOut         the work did not end in its time
    +-- TooManyRequests         the key's rate limit is used up
    +-- TooManyAtOnce           the key has as many requests under way as it may
    +-- TooManyUploads          the tenant's uploads, and what else moves bytes, found no place in time
    +-- QueueFull               as many generations wait, in all or of the tenant, as may
    +-- AddressRefused          a client named an address that this server does not send to
    +-- OutboundFailed          what was sent to a client's address did not arrive
    +-- ServiceUnavailable      an internal part did not answer

`code` is stable and public. What a client reads stands in `serve_app.ingress.errors`, in one table.
Every class survives pickling, so it can cross Ray.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from train_jobs.errors import Problem


class ServeError(Exception):
    """Base of the tree."""

    code: ClassVar[str] = "internal_error"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._args = args

    def __reduce__(self) -> tuple[type[ServeError], tuple[Any, ...]]:
        return (type(self), self._args)


class Unauthorized(ServeError):
    code = "unauthorized"


class KeysNotAllowed(ServeError):
    code = "keys_not_allowed"


class RouteNotFound(ServeError):
    code = "not_found"


class MethodNotAllowed(ServeError):
    code = "method_not_allowed"


class OriginNotAllowed(ServeError):
    code = "origin_not_allowed"


class CorsMethodNotAllowed(ServeError):
    code = "cors_method_not_allowed"


class BodyTooLarge(ServeError):
    code = "body_too_large"

    def __init__(self, limit_bytes: int, way_out: str) -> None:
        """`way_out`: what takes large files where this request went."""
        super().__init__(limit_bytes, way_out)
        self.limit_bytes = limit_bytes
        self.way_out = way_out


class BodyInvalid(ServeError):
    """`reason` is one of our own sentences."""

    code = "body_invalid"

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class InvalidRequest(ServeError):
    code = "invalid_request"

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems: tuple[Problem, ...] = tuple(problems)
        super().__init__(self.problems)


class UnknownJobType(ServeError):
    code = "unknown_job_type"

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class RunpodJobNotFound(ServeError):
    code = "job_not_found"


class RunpodJobNotRetryable(ServeError):
    code = "job_not_retryable"


class RunpodJobNotKept(ServeError):
    code = "job_not_kept"


class TrainingNotEnded(ServeError):
    code = "training_not_ended"


class IdempotencyKeyReused(ServeError):
    code = "idempotency_key_reused"


class ProcessNotFound(ServeError):
    code = "process_not_found"


class ProcessNotCancellable(ServeError):
    code = "process_not_cancellable"


class ProcessNotCompleted(ServeError):
    code = "process_not_completed"


class ProcessFilesDeleted(ServeError):
    code = "process_files_deleted"


class UploadNotFound(ServeError):
    code = "upload_not_found"


class LoraNotUsable(ServeError):
    """`name` is what the request called it; `reason` is one of our own sentences."""

    code = "lora_not_usable"

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name = name
        self.reason = reason


class LoraFileInvalid(ServeError):
    """`reason` is one of our own sentences."""

    code = "lora_file_invalid"

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class GenerationRefused(ServeError):
    """`message` is the failed record's, which is written for clients."""

    code = "generation_refused"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class GenerationFailed(ServeError):
    """Like GenerationRefused, for a failure that the request is no reason for."""

    code = "generation_failed"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class DatasetInUse(ServeError):
    code = "dataset_in_use"

    def __init__(self, folder: str) -> None:
        super().__init__(folder)
        self.folder = folder


class ModelNotServed(ServeError):
    code = "model_not_served"

    def __init__(self, model: str, known: Iterable[str]) -> None:
        self.known: tuple[str, ...] = tuple(sorted(known))
        super().__init__(model, self.known)
        self.model = model


class RequestTimedOut(ServeError):
    """`by_policy`: within the time that the client itself gave the job."""

    code = "timeout"

    def __init__(self, timeout_s: float, by_policy: bool = False) -> None:
        super().__init__(timeout_s, by_policy)
        self.timeout_s = timeout_s
        self.by_policy = by_policy


class TooManyRequests(ServeError):
    code = "rate_limited"

    def __init__(self, retry_after_s: float) -> None:
        super().__init__(retry_after_s)
        self.retry_after_s = retry_after_s


class TooManyAtOnce(ServeError):
    code = "concurrency_limited"

    def __init__(self, retry_after_s: float) -> None:
        super().__init__(retry_after_s)
        self.retry_after_s = retry_after_s


class TooManyUploads(ServeError):
    code = "too_many_uploads"

    def __init__(self, retry_after_s: float) -> None:
        super().__init__(retry_after_s)
        self.retry_after_s = retry_after_s


class QueueFull(ServeError):
    """`waiting` are the tenant's own."""

    code = "queue_full"

    def __init__(self, waiting: int, retry_after_s: float) -> None:
        super().__init__(waiting, retry_after_s)
        self.waiting, self.retry_after_s = waiting, retry_after_s


class AddressRefused(ServeError):
    code = "address_refused"


class OutboundFailed(ServeError):
    """`reason` is one of our own words, a class name of the HTTP client or the status; never an address."""

    code = "outbound_failed"

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class JobInterrupted(ServeError):
    """The process that did a job without a record was lost before the job had ended."""

    code = "job_interrupted"
    retry_after_s: ClassVar[float] = 1.0


class ServiceUnavailable(ServeError):
    """`part` is the name of the internal part: jobs, validation, transfers, dispatch, inference."""

    code = "service_unavailable"
    retry_after_s: ClassVar[float] = 1.0

    def __init__(self, part: str) -> None:
        super().__init__(part)
        self.part = part
