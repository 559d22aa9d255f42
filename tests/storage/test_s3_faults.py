from __future__ import annotations

import inspect

import aiohttp
import pytest
from botocore import exceptions as botocore_errors
from botocore.parsers import ResponseParserError

from storage.errors import (
    IntegrityError,
    ObjectNotFound,
    StorageAccessDenied,
    StorageError,
    StorageFailed,
    StorageMisconfigured,
    StorageRefused,
)
from storage.resilience import TransientFaultError
from storage.s3_faults import mapped, translate

FOREIGN = [
    *(
        error
        for _, error in inspect.getmembers(botocore_errors, inspect.isclass)
        if issubclass(error, botocore_errors.BotoCoreError)
    ),
    *(error for _, error in inspect.getmembers(aiohttp, inspect.isclass) if issubclass(error, aiohttp.ClientError)),
    *(ResponseParserError, TimeoutError, ConnectionResetError, OSError),
]


def answer(status: int, code: str) -> botocore_errors.ClientError:
    response = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return botocore_errors.ClientError(response, "GetObject")


@pytest.mark.parametrize("error", FOREIGN)
def test_every_error_of_the_libraries_is_mapped(error: type[Exception]) -> None:
    foreign = error.__new__(error)

    ours = translate(foreign, "get", "k")

    assert isinstance(ours, StorageError | TransientFaultError)


@pytest.mark.parametrize(
    ("status", "code", "counts"),
    [
        (500, "InternalError", True),
        (502, "502", True),
        (503, "SlowDown", True),
        (200, "InternalError", True),
        (429, "TooManyRequests", True),
        (400, "RequestTimeout", True),
        (400, "ThrottlingException", True),
        (409, "ConditionalRequestConflict", False),
        (409, "OperationAborted", False),
        (400, "BadDigest", False),
        (400, "XAmzContentSHA256Mismatch", False),
    ],
)
def test_a_passing_trouble_is_retried(status: int, code: str, counts: bool) -> None:
    ours = translate(answer(status, code), "put", "k")

    assert isinstance(ours, TransientFaultError)
    assert ours.counts is counts


def test_bytes_that_do_not_arrive_as_they_were_sent_are_an_integrity_error_in_the_end() -> None:
    ours = translate(answer(400, "BadDigest"), "upload_file", "k")

    assert isinstance(ours, TransientFaultError)
    assert isinstance(ours.final, IntegrityError)


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (404, "NoSuchKey", ObjectNotFound),
        (404, "404", ObjectNotFound),
        (404, "NoSuchBucket", StorageMisconfigured),
        (403, "AccessDenied", StorageAccessDenied),
        (403, "SignatureDoesNotMatch", StorageAccessDenied),
        (401, "Unauthorized", StorageAccessDenied),
        (400, "ExpiredToken", StorageAccessDenied),
        (400, "InvalidRequest", StorageRefused),
        (412, "PreconditionFailed", StorageRefused),
        (416, "InvalidRange", StorageRefused),
        (501, "NotImplemented", StorageRefused),
        (404, "NoSuchUpload", StorageRefused),
    ],
)
def test_a_refusal_is_final(status: int, code: str, expected: type[StorageError]) -> None:
    assert type(translate(answer(status, code), "get", "k")) is expected


def test_an_upload_that_is_missing_says_nothing_about_the_bucket() -> None:
    ours = translate(answer(404, "NoSuchUpload"), "list_uploads", None)

    assert isinstance(ours, StorageFailed)
    assert ours.reason == "no_such_upload"


def test_the_bucket_is_what_is_missing_where_there_is_no_key() -> None:
    assert isinstance(translate(answer(404, "404"), "health", None), StorageMisconfigured)


@pytest.mark.parametrize("error", [ObjectNotFound("k"), TransientFaultError("x"), KeyError("a bug")])
def test_what_is_not_theirs_passes_unchanged(error: Exception) -> None:
    with pytest.raises(type(error)) as raised, mapped("get", "k"):
        raise error

    assert raised.value is error


def test_the_cause_is_kept_and_its_text_is_not() -> None:
    theirs = aiohttp.ClientPayloadError("https://host/secret?signature")

    with pytest.raises(TransientFaultError) as raised, mapped("get", "k"):
        raise theirs

    assert raised.value.__cause__ is theirs
    assert "secret" not in str(raised.value)
