"""What can go wrong in storage.

    StorageError
    |-- ObjectNotFound            the key names nothing
    |-- StorageAccessDenied       the backend refuses our credentials
    |-- InvalidKey                the key may not be used
    |-- IntegrityError            the bytes are not the ones that were promised
    |-- StorageUnavailable        the breaker is open, or opened between two attempts
    |-- StorageTimeout            the deadline passed
    |-- StorageFailed             all attempts failed
    |   `-- StorageRefused        the backend refused the request, and will again
    `-- StorageMisconfigured      settings that cannot work
        `-- PortInUse             the embedded server's port belongs to somebody else

Messages hold neither keys nor URLs, so that logging an error gives nothing away; keys are attributes. Every
error survives pickle, because it crosses Ray.
"""

from __future__ import annotations

from typing import Any, ClassVar

# What failed a moment ago has had its retries: a little later makes more sense than at once.
RETRY_AFTER_S = 5.0


class StorageError(Exception):
    """The root. `code` is stable and meant for machines. `retry_after_s` is when asking again makes sense, None where
    it does not."""

    code: ClassVar[str] = "storage_error"
    retry_after_s: float | None = None

    def __init__(self, message: str, *arguments: Any) -> None:
        super().__init__(message)
        self._arguments = arguments or (message,)

    def __reduce__(self) -> tuple[type[StorageError], tuple[Any, ...]]:
        return type(self), self._arguments


class ObjectNotFound(StorageError):
    code = "object_not_found"

    def __init__(self, key: str) -> None:
        super().__init__("the object does not exist", key)
        self.key = key


class StorageAccessDenied(StorageError):
    code = "storage_access_denied"

    def __init__(self, operation: str) -> None:
        super().__init__(f"the storage backend denied {operation}", operation)
        self.operation = operation


class InvalidKey(StorageError):
    """`reason` says what is wrong without quoting the key."""

    code = "invalid_key"

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(f"invalid key: {reason}", key, reason)
        self.key = key
        self.reason = reason


class IntegrityError(StorageError):
    """`expected` and `actual` are digests or lengths."""

    code = "integrity_error"

    def __init__(self, key: str, expected: str, actual: str) -> None:
        super().__init__(f"the stored bytes differ: expected {expected}, found {actual}", key, expected, actual)
        self.key = key
        self.expected = expected
        self.actual = actual


class StorageUnavailable(StorageError):
    """No attempt is let out. `attempts` were made before, at least: 0 where nothing was tried, more where the breaker
    opened between the attempts of this call."""

    code = "storage_unavailable"
    retry_after_s: float

    def __init__(self, operation: str, retry_after_s: float, attempts: int = 0) -> None:
        tried = f" after {attempts} attempts" if attempts else ""
        super().__init__(
            f"storage is unavailable for {operation}{tried}, retry in {retry_after_s:.0f} s",
            operation,
            retry_after_s,
            attempts,
        )
        self.operation = operation
        self.retry_after_s = retry_after_s
        self.attempts = attempts

    def after(self, attempts: int) -> StorageUnavailable:
        """The same of a call that had made so many attempts before this part of it."""
        return StorageUnavailable(self.operation, self.retry_after_s, attempts + self.attempts)


class StorageTimeout(StorageError):
    code = "storage_timeout"
    retry_after_s = RETRY_AFTER_S

    def __init__(self, operation: str, deadline_s: float) -> None:
        super().__init__(f"{operation} did not end within {deadline_s:g} s", operation, deadline_s)
        self.operation = operation
        self.deadline_s = deadline_s


class StorageFailed(StorageError):
    """`reason` is one of our own words (`server_error`, `connection`, ...), never the backend's text."""

    code = "storage_failed"
    retry_after_s: float | None = RETRY_AFTER_S

    def __init__(self, operation: str, attempts: int, reason: str) -> None:
        super().__init__(f"{operation} failed after {attempts} attempts: {reason}", operation, attempts, reason)
        self.operation = operation
        self.attempts = attempts
        self.reason = reason


class StorageRefused(StorageFailed):
    code = "storage_refused"
    retry_after_s = None


class StorageMisconfigured(StorageError):
    code = "storage_misconfigured"

    def __init__(self, reason: str) -> None:
        super().__init__(reason, reason)
        self.reason = reason


class PortInUse(StorageMisconfigured):
    code = "port_in_use"

    def __init__(self, port: int) -> None:
        super().__init__(f"port {port} is in use by another program")
        self._arguments = (port,)
        self.port = port


# ----------------------------------------------------------------------------------------------------- jobs
#
#   JobError
#   |-- JobNotFound               no such job, or not this tenant's
#   |-- IllegalTransition         the state machine has no such step
#   |-- IdempotencyConflict       the key was used with another body
#   |-- IdempotencyInFlight       the first request with this key is not finished
#   |-- LeaseLost                 somebody else, or nobody, owns the job now
#   |-- JobNotCancellable         the job has ended
#   |-- JobNotRetryable           only FAILED and TIMED_OUT jobs are retried
#   |-- InvalidCursor             a page cursor that we did not give
#   |-- JobsUnavailable           the jobs actor does not answer
#   `-- RecordsError
#       |-- RecordsUnavailable    the database cannot be reached or is locked
#       |-- RecordConflict        a unique value is taken
#       |-- RecordsFailed         the database refused
#       `-- RecordsMisconfigured  its URL cannot work


class JobError(Exception):
    """The root of the life cycle's errors. `code` is stable and meant for machines."""

    code: ClassVar[str] = "job_error"

    def __init__(self, message: str, *arguments: Any) -> None:
        super().__init__(message)
        self._arguments = arguments or (message,)

    def __reduce__(self) -> tuple[type[JobError], tuple[Any, ...]]:
        return type(self), self._arguments


class JobNotFound(JobError):
    code = "job_not_found"

    def __init__(self, job_id: str) -> None:
        super().__init__("the job does not exist", job_id)
        self.job_id = job_id


class ApiKeyNotFound(JobError):
    code = "key_not_found"

    def __init__(self, key_id: str) -> None:
        super().__init__("the API key does not exist", key_id)
        self.key_id = key_id


class IllegalTransition(JobError):
    code = "illegal_transition"

    def __init__(self, job_id: str, source: str, target: str) -> None:
        super().__init__(f"{job_id} cannot go from {source} to {target}", job_id, source, target)
        self.job_id = job_id
        self.source = source
        self.target = target


class IdempotencyConflict(JobError):
    code = "idempotency_conflict"

    def __init__(self, key: str) -> None:
        super().__init__("the idempotency key was used with another body", key)
        self.key = key


class IdempotencyInFlight(JobError):
    code = "idempotency_in_flight"
    # Most first requests end within it; one that does not is asked for again.
    retry_after_s: ClassVar[float] = 1.0

    def __init__(self, key: str) -> None:
        super().__init__("a request with this idempotency key is in flight", key)
        self.key = key


class LeaseLost(JobError):
    """The caller must stop working on the job and must not write its results."""

    code = "lease_lost"

    def __init__(self, job_id: str, owner: str) -> None:
        super().__init__(f"{owner} does not hold the lease of {job_id}", job_id, owner)
        self.job_id = job_id
        self.owner = owner


class JobNotCancellable(JobError):
    code = "job_not_cancellable"

    def __init__(self, job_id: str, state: str) -> None:
        super().__init__(f"{job_id} is {state} and cannot be cancelled", job_id, state)
        self.job_id = job_id
        self.state = state


class JobNotRetryable(JobError):
    code = "job_not_retryable"

    def __init__(self, job_id: str, state: str) -> None:
        super().__init__(f"{job_id} is {state} and cannot be retried", job_id, state)
        self.job_id = job_id
        self.state = state


class InvalidCursor(JobError):
    code = "invalid_cursor"

    def __init__(self) -> None:
        super().__init__("the page cursor is not one of ours")
        self._arguments = ()


class JobsUnavailable(JobError):
    """Whether the operation happened is unknown."""

    code = "jobs_unavailable"
    retry_after_s: ClassVar[float] = 1.0

    def __init__(self, operation: str) -> None:
        super().__init__(f"the jobs actor does not answer {operation}", operation)
        self.operation = operation


class RecordsError(JobError):
    code = "records_error"


class RecordsUnavailable(RecordsError):
    code = "records_unavailable"
    retry_after_s: ClassVar[float] = 1.0

    def __init__(self, operation: str) -> None:
        super().__init__(f"the records database is unavailable for {operation}", operation)
        self.operation = operation


class RecordConflict(RecordsError):
    code = "record_conflict"

    def __init__(self, operation: str) -> None:
        super().__init__(f"{operation} would break a unique value of the records", operation)
        self.operation = operation


class RecordsFailed(RecordsError):
    """`reason` is the name of the database's error, never its text."""

    code = "records_failed"

    def __init__(self, operation: str, reason: str) -> None:
        super().__init__(f"the records database failed at {operation}: {reason}", operation, reason)
        self.operation = operation
        self.reason = reason


class RecordsMisconfigured(RecordsError):
    code = "records_misconfigured"

    def __init__(self, reason: str) -> None:
        super().__init__(reason, reason)
        self.reason = reason
