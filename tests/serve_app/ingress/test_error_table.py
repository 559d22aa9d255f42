import json
import pickle
from http import HTTPStatus
from typing import Any

import pytest

import diffusion.errors
import serve_app.errors
import storage.datasets
import storage.errors
import train_jobs.errors
from serve_app.ingress.errors import TABLE, describe
from serve_app.ingress.replies import error_response
from train_jobs.errors import Problem

ROOTS = (
    serve_app.errors.ServeError,
    storage.errors.StorageError,
    storage.errors.JobError,
    train_jobs.errors.TrainingError,
    diffusion.errors.DiffusionError,
)
SECRET = "http://10.0.0.1:9000/bucket/key?X-Amz-Signature=abc /root/secret"
ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "BodyTooLarge": (10 * 1024 * 1024, "create_upload"),
    "InvalidRequest": ([Problem("prompt", "is missing", "missing")],),
    "ConfigInvalid": ([Problem("config", "is missing", "missing")],),
    "ModelNotServed": ("x", ("tiny",)),
    "GenerationRefused": ("It was too large.",),
    "GenerationFailed": ("It was lost.",),
    "LoraNotUsable": ("x", "it is not there"),
    "RequestTimedOut": (600.0,),
    "TooManyRequests": (2.5,),
    "TooManyAtOnce": (1.0,),
    "TooManyUploads": (30.0,),
    "QueueFull": (1000, 10.0),
    "InsufficientMemory": (8 * 2**30, 2**20),
    "StorageUnavailable": ("get", 12.3),
    "StorageTimeout": ("get", 5.0),
    "StorageFailed": ("get", 4, "connection"),
    "PortInUse": (9000,),
    "DatasetNotStored": ("cats", (("a.png", "storage_timeout"),), 41.0),
    "SizeNotSupported": (1, 2, 8),
    "Cancelled": (1, 2),
    "OutOfGpuMemory": (1, 8, 8, None, None),
    "NonFiniteLoss": (3, ["a.png"]),
    "ImageUnreadable": (["a.png"],),
}


def subclasses(root: type[Exception]) -> list[type[Exception]]:
    return [root, *(found for cls in root.__subclasses__() for found in subclasses(cls))]


def instance(cls: type[Exception]) -> Exception:
    key = cls.__name__ if cls is not train_jobs.errors.StorageFailed else ""
    if key in ARGUMENTS:
        return cls(*ARGUMENTS[key])
    for count in range(5):
        try:
            return cls(*(["word"] * count))
        except TypeError:
            continue
    raise AssertionError(f"add arguments for {cls.__name__}")


EVERY_CLASS = [cls for root in ROOTS for cls in subclasses(root) if not cls.__module__.startswith("test")]


@pytest.mark.parametrize("cls", EVERY_CLASS, ids=lambda cls: f"{cls.__module__}.{cls.__name__}")
def test_every_error_has_a_row_of_its_own(cls: type[Exception]) -> None:
    assert cls in TABLE, f"add a row for {cls.__module__}.{cls.__name__}"


@pytest.mark.parametrize("cls", EVERY_CLASS, ids=lambda cls: f"{cls.__module__}.{cls.__name__}")
def test_every_error_has_a_status_a_code_and_a_sentence(cls: type[Exception]) -> None:
    public = describe(instance(cls))
    assert 400 <= public.status < 600
    assert public.code.replace("_", "").isalnum()
    assert len(public.message) > 5


@pytest.mark.parametrize("cls", subclasses(serve_app.errors.ServeError), ids=lambda cls: cls.__name__)
def test_errors_of_the_http_side_survive_pickling(cls: type[Exception]) -> None:
    error = instance(cls)
    again = pickle.loads(pickle.dumps(error))  # noqa: S301 our own bytes
    assert type(again) is cls
    assert describe(again) == describe(error)


@pytest.mark.parametrize("error", [RuntimeError(SECRET), KeyError(SECRET), OSError(2, SECRET), ValueError(SECRET)])
def test_an_unexpected_errors_text_does_not_leak(error: Exception) -> None:
    body = bytes(error_response(error, path="/v2/x/run", request_id="r").body).decode()
    assert describe(error).code == "internal_error"
    assert "secret" not in body
    assert "Signature" not in body


@pytest.mark.parametrize(
    "error",
    [
        storage.errors.ObjectNotFound("a/secret/key"),
        storage.errors.IntegrityError("a/secret/key", "aa", "bb"),
        storage.errors.StorageMisconfigured("/secret/path"),
        storage.errors.RecordsMisconfigured("postgres://secret"),
        storage.errors.InvalidKey("a/secret/key", "a reason"),
    ],
)
def test_keys_and_server_settings_stay_inside(error: Exception) -> None:
    assert "secret" not in describe(error).message


def test_an_error_that_ray_wrapped_is_described_by_its_cause() -> None:
    class Wrapped(Exception):
        cause = storage.errors.StorageUnavailable("get", 12.3)

    public = describe(Wrapped(SECRET))
    assert (public.status, public.code, public.retry_after_s) == (503, "storage_unavailable", 13)


@pytest.mark.parametrize(
    "error",
    [
        storage.errors.JobsUnavailable("get"),
        storage.errors.RecordsUnavailable("get"),
        serve_app.errors.JobInterrupted(),
        serve_app.errors.ServiceUnavailable("dispatch"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_part_that_is_away_for_a_moment_may_be_asked_again_after_one(error: Exception) -> None:
    assert (describe(error).status, describe(error).retry_after_s) == (503, 1)


@pytest.mark.parametrize("cls", EVERY_CLASS, ids=lambda cls: cls.__name__)
def test_a_problem_has_the_status_as_its_title_and_this_occurrence_as_its_detail(cls: type[Exception]) -> None:
    error = instance(cls)
    reply = error_response(error, path="/v1/trainings", request_id="r")
    problem = json.loads(bytes(reply.body))
    assert problem["title"] == HTTPStatus(reply.status_code).phrase
    assert (problem["detail"], problem["code"]) == (describe(error).message, describe(error).code)


@pytest.mark.parametrize("path", ["/v2/x/run", "/readyz", "/v1/images/generations", "/v1/hf/tiny"])
@pytest.mark.parametrize("cls", EVERY_CLASS, ids=lambda cls: cls.__name__)
def test_no_error_body_has_a_status_field(cls: type[Exception], path: str) -> None:
    assert b'"status"' not in bytes(error_response(instance(cls), path=path, request_id="r").body)
