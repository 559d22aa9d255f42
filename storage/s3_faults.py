"""The seam where errors of botocore, aiohttp and obstore become ours. Nothing of theirs leaves `storage.s3`.

| from the backend                                              | ours                               | breaker  |
|---------------------------------------------------------------|------------------------------------|----------|
| 5xx but 501, SlowDown and other throttles, RequestTimeout     | retried, then StorageFailed        | failure  |
| timeouts (`resilience` may excuse one)                        | retried, then StorageTimeout       | failure  |
| connections refused or cut, truncated or garbled answers      | retried, then StorageFailed        | failure  |
| 409 ConditionalRequestConflict, OperationAborted              | retried, then StorageFailed        | neutral  |
| bytes that do not match their digest                          | retried, then IntegrityError       | neutral  |
| 404 of a key                                                  | ObjectNotFound                     | success  |
| 401, 403, expired tokens                                      | StorageAccessDenied                | success  |
| no such bucket, settings that the client refuses              | StorageMisconfigured               | success  |
| 400, 412, 416, 501 and all else                               | StorageRefused                     | success  |
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import aiohttp
from botocore import exceptions as botocore_errors
from botocore.parsers import ResponseParserError
from obstore.exceptions import BaseError

from storage.errors import IntegrityError, ObjectNotFound, StorageAccessDenied, StorageMisconfigured, StorageRefused
from storage.resilience import THROTTLED, TransientFaultError
from storage.s3_bodies import Refusal, is_timeout, is_truncation, refusal_of

# From botocore.retries.standard, and S3's own.
_THROTTLES = frozenset(
    {
        "BandwidthLimitExceeded",
        "LimitExceededException",
        "PriorRequestNotComplete",
        "RequestLimitExceeded",
        "RequestThrottled",
        "RequestThrottledException",
        "SlowDown",
        "ThrottledException",
        "Throttling",
        "ThrottlingException",
        "TooManyRequestsException",
        "503",
        "429",
    }
)
_DENIALS = frozenset({"AccessDenied", "ExpiredToken", "InvalidToken", "TokenRefreshRequired"})
_CONFLICTS = frozenset({"ConditionalRequestConflict", "OperationAborted"})
# The server received other bytes than those that were hashed here.
_MISMATCHES = frozenset({"BadDigest", "XAmzContentChecksumMismatch", "XAmzContentSHA256Mismatch"})

# S3 gives the refusal of one key among many no status of its own.
_OF_ONE_KEY = 400
# Why `StorageRefused` is raised for a 412.
PRECONDITION = "precondition"

_TIMEOUTS = (
    TimeoutError,
    botocore_errors.ConnectTimeoutError,
    botocore_errors.ReadTimeoutError,
)
_TRUNCATIONS = (
    botocore_errors.IncompleteReadError,
    botocore_errors.ResponseStreamingError,
    aiohttp.ClientPayloadError,
)
_CORRUPTIONS = (botocore_errors.ChecksumError, botocore_errors.FlexibleChecksumError)
_CONNECTIONS = (
    botocore_errors.HTTPClientError,
    botocore_errors.ConnectionError,
    aiohttp.ClientError,
    OSError,
)


@contextmanager
def mapped(operation: str, key: str | None) -> Iterator[None]:
    """Raise our error from theirs. `key` is None for what concerns the bucket. Only S3 calls belong inside."""
    try:
        yield
    except Exception as error:
        ours = translate(error, operation, key)
        if ours is None:
            raise
        raise ours from error


def translate(error: Exception, operation: str, key: str | None) -> Exception | None:
    """Our error for a foreign one; None for what is ours already, or a programming error."""
    if isinstance(error, botocore_errors.ClientError):
        return _translate_refusal(_refusal_in(error), operation, key)
    if isinstance(error, BaseError | FileNotFoundError):
        return _translate_obstore(error, operation, key)
    if isinstance(error, _TIMEOUTS):
        return TransientFaultError("timeout", timed_out=True)
    if isinstance(error, _TRUNCATIONS):
        return TransientFaultError("truncated")
    if isinstance(error, _CORRUPTIONS):
        return _corrupted(key)
    if isinstance(error, ResponseParserError):
        return TransientFaultError("garbled")
    if isinstance(error, _CONNECTIONS):
        return TransientFaultError("connection")
    if isinstance(error, botocore_errors.BotoCoreError):
        return StorageMisconfigured(f"the S3 client cannot do {operation} with these settings")
    return None


def raise_for_keys(errors: Iterable[Mapping[str, str]], operation: str) -> None:
    """Raise our error for the keys that a call on many of them, itself a success, names with a `Code` each.

    Of several, the one that another attempt may mend: it brings the others back. A key that is missing is no error.
    """
    ours = [
        _translate_refusal(Refusal(_OF_ONE_KEY, error.get("Code", "")), operation, error["Key"]) for error in errors
    ]
    found = [error for error in ours if not isinstance(error, ObjectNotFound)]
    if found:
        raise max(found, key=lambda error: (isinstance(error, TransientFaultError), getattr(error, "counts", False)))


def _refusal_in(error: botocore_errors.ClientError) -> Refusal:
    code = str(error.response.get("Error", {}).get("Code", ""))
    return Refusal(int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)), code)


def _translate_obstore(error: Exception, operation: str, key: str | None) -> Exception:
    refusal = refusal_of(error)
    if refusal is not None:
        return _translate_refusal(refusal, operation, key)
    if is_timeout(error):
        return TransientFaultError("timeout", timed_out=True)
    return TransientFaultError("truncated" if is_truncation(error) else "connection")


def _translate_refusal(refusal: Refusal, operation: str, key: str | None) -> Exception:
    status, code = refusal.status, refusal.code
    if code in _THROTTLES or status == 429:
        return TransientFaultError(THROTTLED)
    if code == "RequestTimeout":
        return TransientFaultError("timeout", timed_out=True)
    if code in _MISMATCHES:
        return _corrupted(key)
    if code in _CONFLICTS:
        return TransientFaultError("conflict", counts=False)
    if status in {401, 403} or code in _DENIALS:
        return StorageAccessDenied(operation)
    if code == "NoSuchUpload":
        return StorageRefused(operation, 1, "no_such_upload")
    if code == "NoSuchBucket" or (status == 404 and key is None):
        return StorageMisconfigured("the bucket does not exist")
    if status == 404 or code in {"NoSuchKey", "404"}:
        return ObjectNotFound(key or "")
    if code in {"BucketAlreadyOwnedByYou", "BucketAlreadyExists"}:
        return StorageRefused(operation, 1, "bucket_exists")
    # Complete and copy may answer 200 and fail in the body; the code then is all there is.
    if code in {"InternalError", "ServiceUnavailable"} or (status >= 500 and status != 501):
        return TransientFaultError("server_error")
    return StorageRefused(operation, 1, _reason(status))


def _corrupted(key: str | None) -> TransientFaultError:
    final = IntegrityError(key or "", "the backend's checksum", "another one")
    return TransientFaultError("corrupted", counts=False, final=final)


def _reason(status: int) -> str:
    known = {400: "bad_request", 405: "not_allowed", 412: PRECONDITION, 416: "range", 501: "not_implemented"}
    return known.get(status, f"status_{status}")
